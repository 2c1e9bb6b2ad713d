export default {
  /** @param {{model: WidgetModel, el: HTMLElement}} place */
  render({model, el: root}) {
    const source = kernelSource(model);
    const view = new ExampleView(root, source);
    return () => {
      source.close();
      view.root.remove();
    };
  },
};
