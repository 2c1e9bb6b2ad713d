export default {
  /** @param {{model: WidgetModel, el: HTMLElement}} place */
  render({model, el: root}) {
    const source = kernelSource(model),
      selected = sharedList(model, "selected");
    const view = new MoverView(root, /** @type {any} */ (source), selected);
    return () => {
      source.close();
      selected.close();
      view.root.remove();
    };
  },
};
