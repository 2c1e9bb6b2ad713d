export default {
  /** @param {{model: WidgetModel, el: HTMLElement}} place */
  render({model, el: root}) {
    const source = kernelSource(model);
    /** @type {Set<() => void>} */
    const calls = new Set();
    const changed = () => calls.forEach(call => call());
    model.on("change:weights", changed);
    const view = new MixerView(root, /** @type {any} */ (source), {
      get: () => model.get("weights"),
      set(weights) {
        model.set("weights", weights);
        model.save_changes();
      },
      onChange: call => calls.add(call),
    });
    return () => {
      source.close();
      model.off("change:weights", changed);
      view.root.remove();
    };
  },
};
