export default {
  /** @param {{model: WidgetModel, el: HTMLElement}} place */
  render({model, el: root}) {
    const source = kernelSource(model),
      weights = sharedList(model, "weights");
    const view = new MixerView(root, /** @type {any} */ (source), weights);
    return () => {
      source.close();
      weights.close();
      view.root.remove();
    };
  },
};
