// The page's toasts, in frontend 1.47's way and in 1.58's.
import { app } from "../../scripts/app.js";

// severity: "error" or "warn". Gives what takes the toast away: 1.47 removes a toast by the message
// that was added, 1.58 dismisses it by its id.
export function show(severity, summary, detail) {
  const toast = app.extensionManager.toast;
  if (toast.remove) {
    const message = { severity, summary, detail };
    toast.add(message);
    return () => toast.remove(message);
  }
  const kind = severity === "warn" ? "warning" : severity;
  const id = toast[kind](summary, { description: detail });
  return () => toast.dismiss(id);
}
