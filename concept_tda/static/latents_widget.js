export default {
  /** @param {{model: WidgetModel, el: HTMLElement}} place */
  render({model, el: root}) {
    /** @type {Set<() => void>} */
    const calls = new Set();
    const changed = () => calls.forEach(call => call());
    model.on("change:selected", changed);
    const view = new LatentView(
      root,
      {table: model.get("table"), texts: model.get("texts")},
      {
        get: () => model.get("selected"),
        set(latents) {
          model.set("selected", latents);
          model.save_changes();
        },
        onChange: call => calls.add(call),
        close: () => model.off("change:selected", changed),
      },
    );
    return () => {
      view.shared?.close();
      view.root.remove();
    };
  },
};
