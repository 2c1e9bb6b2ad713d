export default {
  /** @param {{model: WidgetModel, el: HTMLElement}} place */
  render({model, el: root}) {
    const selected = sharedList(model, "selected"),
      data = {table: model.get("table"), texts: model.get("texts")};
    const view = new LatentView(root, data, selected);
    return () => {
      selected.close();
      view.root.remove();
    };
  },
};
