// The page says "This node threw an error" and keeps the sentence two clicks away; of Kindred's
// own nodes it is shown at once.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

let shown = null; // the one toast that stands

function close() {
  if (shown) app.extensionManager.toast.remove(shown);
  shown = null;
}

function say(type, message) {
  close();
  const name = LiteGraph.registered_node_types[type]?.title ?? type;
  const start = `${name}: `;
  const detail = message.startsWith(start) ? message.slice(start.length) : message;
  shown = { severity: "error", summary: name, detail: detail.trim() };
  app.extensionManager.toast.add(shown);
}

app.registerExtension({
  name: "kindred.errors",
  setup() {
    api.addEventListener("execution_start", close);
    api.addEventListener("execution_error", ({ detail }) => {
      const type = detail?.node_type ?? "";
      if (type.startsWith("Kindred") && detail.exception_message)
        say(type, detail.exception_message);
    });
  },
});
