// The page keeps the last live preview of a node that is done: Nodes 2.0 shows it twice, below the
// node and in place of its result (frontend 1.47, nodeOutputStore). Of Kindred's nodes it goes when
// the result is there.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { find, place } from "./nodes.js";

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
