// The page says "This node threw an error", or "rejected the value" where Run was pressed, and keeps
// the sentence two clicks away; of Kindred's own nodes it is shown at once.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

let takeAway = null; // of the one toast that stands

function close() {
  takeAway?.();
  takeAway = null;
}

// Frontend 1.47 removes a toast by the message that was added, 1.58 dismisses it by its id.
function show(summary, detail) {
  const toast = app.extensionManager.toast;
  if (toast.remove) {
    const message = { severity: "error", summary, detail };
    toast.add(message);
    return () => toast.remove(message);
  }
  const id = toast.error(summary, { description: detail });
  return () => toast.dismiss(id);
}

function say(type, message) {
  close();
  const name = LiteGraph.registered_node_types[type]?.title ?? type;
  const start = `${name}: `;
  const detail = message.startsWith(start) ? message.slice(start.length) : message;
  takeAway = show(name, detail.trim());
}

// What a node's validate_inputs said: "input - sentence", once for every input.
function sayRefused(nodeErrors) {
  for (const { class_type: type, errors } of Object.values(nodeErrors ?? {})) {
    const own = errors?.find((error) => error.type === "custom_validation_failed");
    if (type?.startsWith("Kindred") && own) {
      say(type, own.details.slice(own.details.indexOf(" - ") + 3));
      return;
    }
  }
}

app.registerExtension({
  name: "kindred.errors",
  setup() {
    const queuePrompt = api.queuePrompt;
    api.queuePrompt = async function (...prompt) {
      close();
      try {
        const answer = await queuePrompt.apply(this, prompt);
        sayRefused(answer?.node_errors);
        return answer;
      } catch (error) {
        sayRefused(error?.response?.node_errors);
        throw error;
      }
    };
    api.addEventListener("execution_error", ({ detail }) => {
      const type = detail?.node_type ?? "";
      if (type.startsWith("Kindred") && detail.exception_message)
        say(type, detail.exception_message);
    });
  },
});
