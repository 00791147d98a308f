// Nodes of the page and the ids by which the server and the page's stores call them.
import { app } from "../../scripts/app.js";

const root = () => app.rootGraph ?? app.graph;

// By the server's id: "4", or "4:10" inside subgraph 4.
export function find(id) {
  let graph = root();
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part);
    graph = node?.subgraph;
  }
  return node;
}

// How the page's stores name a node.
export function place(node) {
  return node.graph === root() ? String(node.id) : `${node.graph.id}:${node.id}`;
}
