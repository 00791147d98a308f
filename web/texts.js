// What Kindred says on a node stays there until the node runs again, and no longer: frontend 1.58
// takes a node's progress text away at the end of the run, 1.47 never. Where the node is out of
// sight, in a blueprint or behind an app, its warnings are toasts.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { find } from "./nodes.js";
import { show } from "./toasts.js";

const WIDGET = "$$node-text-preview"; // the page's own, which shows a progress text
const texts = new Map(); // of a server's id: the node and its text
const warned = new Map(); // in this run: what takes its toast away

const shown = (node) => node?.widgets?.find((widget) => widget.name === WIDGET);

function keep({ detail: { node: id, text, warning } }) {
  const node = find(id);
  if (node) texts.set(String(id), { node, text });
  if (!warning || warned.has(warning) || !String(id).includes(":")) return;
  warned.set(warning, show("warn", node?.title ?? "Kindred", warning));
}

function begin() {
  for (const close of warned.values()) close();
  warned.clear();
}

function putBack() {
  for (const [nodeId, { node, text }] of texts) {
    if (find(nodeId) !== node) texts.delete(nodeId); // another workflow stands on the page
    else if (!shown(node)) api.dispatchCustomEvent("progress_text", { nodeId, text });
  }
}

function takeAway({ detail }) {
  const id = String(detail?.node ?? detail);
  const old = texts.get(id);
  if (!old || find(id) !== old.node) return;
  texts.delete(id);
  const widget = shown(old.node);
  if (widget?.value !== old.text) return; // another pack's
  widget.onRemove?.();
  old.node.widgets.splice(old.node.widgets.indexOf(widget), 1);
  old.node.setDirtyCanvas?.(true);
}

app.registerExtension({
  name: "kindred.texts",
  setup() {
    api.addEventListener("kindred.text", keep);
    api.addEventListener("executing", takeAway);
    api.addEventListener("execution_start", begin);
    for (const end of ["execution_success", "execution_error", "execution_interrupted"])
      api.addEventListener(end, () => setTimeout(putBack)); // behind the page's own listeners
  },
});
