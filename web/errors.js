// The page says "This node threw an error", or "rejected the value" where Run was pressed, and keeps
// the sentence two clicks away; of Kindred's own nodes, and of its own code in a sampler, it is shown
// at once.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { show } from "./toasts.js";

const FOLDER = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2)); // the pack's
let takeAway = null; // of the one toast that stands

function close() {
  takeAway?.();
  takeAway = null;
}

// Whether the innermost line of a failed node stands in a file of the pack.
function ours(traceback) {
  const file = (traceback?.at(-1) ?? "").replaceAll("\\", "/");
  return file.includes(`custom_nodes/${FOLDER}/`);
}

function say(type, message) {
  close();
  const name = LiteGraph.registered_node_types[type]?.title ?? type;
  const start = `${name}: `;
  const detail = message.startsWith(start) ? message.slice(start.length) : message;
  takeAway = show("error", name, detail.trim());
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
      if ((type.startsWith("Kindred") || ours(detail?.traceback)) && detail.exception_message)
        say(type, detail.exception_message);
    });
  },
});
