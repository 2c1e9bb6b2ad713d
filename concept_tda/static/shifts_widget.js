export default {
  /** @param {{model: WidgetModel, el: HTMLElement}} place */
  render({model, el: root}) {
    /** @type {Set<() => void>} */
    const calls = new Set();
    const changed = () => calls.forEach(call => call());
    for (const name of ["row", "targets"]) model.on(`change:${name}`, changed);
    const data = {table: model.get("table"), numbers: model.get("numbers"), texts: model.get("texts")};
    const view = new ShiftView(root, data, {
      get: () => ({row: model.get("row"), targets: model.get("targets")}),
      set(name, value) {
        model.set(name, value);
        model.save_changes();
      },
      onChange: call => calls.add(call),
    });
    return () => {
      for (const name of ["row", "targets"]) model.off(`change:${name}`, changed);
      view.root.remove();
    };
  },
};
