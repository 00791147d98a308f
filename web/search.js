// Blueprints of packs are found by their names alone: the page reads BlueprintSearchAliases, then
// puts the server's answer, which has none, over them (frontends 1.47 to 1.58, subgraphStore).
// Kindred's get theirs back.
import { app } from "../../scripts/app.js";

const CATEGORY = "Subgraph Blueprints/Kindred";
const PATIENCE = 60; // looks, one a second: blueprints are loaded while the page already works

function named(stores) {
  const store = stores.get("subgraph");
  // 1.47 keeps them with the subgraphs, 1.58 with the nodes
  const all = store?.subgraphBlueprints ?? stores.get("nodeDef")?.nodeDefs ?? [];
  const ours = all.filter((def) => def.category === CATEGORY && def.isGlobal);
  for (const def of ours)
    def.search_aliases ??= store.getBlueprint(def.name).extra?.BlueprintSearchAliases;
  return ours.length > 0;
}

function look(left) {
  // through Pinia's own fields; where a later page has none, blueprints are still found by name
  const stores = app.extensionManager?._p?._s;
  if (left && stores && !named(stores)) setTimeout(look, 1000, left - 1);
}

app.registerExtension({
  name: "kindred.search",
  setup() {
    look(PATIENCE);
  },
});
