export default {
  /** @param {{model: WidgetModel, el: HTMLElement}} place */
  render({model, el: root}) {
    const source = kernelSource(model);
    /** @type {Set<() => void>} */
    const calls = new Set();
    const changed = () => calls.forEach(call => call());
    model.on("change:selected", changed);
    const view = new MoverView(root, /** @type {any} */ (source), {
      get: () => model.get("selected"),
      set(places) {
        model.set("selected", places);
        model.save_changes();
      },
      onChange: call => calls.add(call),
      close: () => model.off("change:selected", changed),
    });
    return () => {
      source.close();
      view.shared?.close();
      view.root.remove();
    };
  },
};
