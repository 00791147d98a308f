// The page keeps the last live preview of a node that is done: Nodes 2.0 shows it twice, below the
// node and in place of its result (frontend 1.47, nodeOutputStore). Of Kindred's nodes it goes when
// the result is there.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

// A node of the page by the id that the server calls it: "4", or "4:10" inside subgraph 4.
function find(id) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part);
    graph = node?.subgraph;
  }
  return node;
}

// How the page's stores name it.
function place(node) {
  const root = app.rootGraph ?? app.graph;
  return node.graph === root ? String(node.id) : `${node.graph.id}:${node.id}`;
}

app.registerExtension({
  name: "kindred.previews",
  setup() {
    api.addEventListener("executed", ({ detail }) => {
      const node = find(detail?.display_node || detail?.node);
      if (!node?.type?.startsWith("Kindred") || !detail.output?.images?.length) return;
      // through Pinia's own fields; where a later page has none, the picture stands twice again
      const store = app.extensionManager?._p?._s?.get("nodeOutput");
      store?.revokePreviewsByLocatorId?.(place(node));
    });
  },
});
