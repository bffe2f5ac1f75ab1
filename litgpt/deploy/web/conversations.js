/** Conversations, kept in this browser and nowhere else: each under its own key of the page's storage. */

const PREFIX = "litgpt.conversation.";

/** A storage that lives as long as the page, for browsers that forbid the real one. */
class Memory {
  items = new Map();
  get length() {
    return this.items.size;
  }
  key(index) {
    return [...this.items.keys()][index];
  }
  getItem(key) {
    return this.items.get(key) ?? null;
  }
  setItem(key, value) {
    this.items.set(key, value);
  }
  removeItem(key) {
    this.items.delete(key);
  }
}

/** Return `localStorage` or `sessionStorage`, or what stands in for it where the browser forbids it. */
export function storage(name) {
  try {
    window[name].getItem(PREFIX);
    return window[name];
  } catch {
    return new Memory();
  }
}

const kept = storage("localStorage");

/** Put a text into a storage; return false where the browser has no room left for it. */
export function put(store, key, value) {
  try {
    store.setItem(key, value);
    return true;
  } catch {
    return false;
  }
}

/** Return a conversation without messages. */
export function fresh() {
  const id = Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, title: "", changed: Date.now(), messages: [] };
}

/** Return all conversations, the one changed last first; what cannot be read is left where it is. */
export function all() {
  const found = [];
  for (let index = 0; index < kept.length; index++) {
    const key = kept.key(index);
    const conversation = key.startsWith(PREFIX) && read(key.slice(PREFIX.length));
    if (conversation) found.push(conversation);
  }
  return found.sort((a, b) => b.changed - a.changed);
}

/** Return a conversation, or null where there is none that can be read. */
export function read(id) {
  try {
    const conversation = JSON.parse(kept.getItem(PREFIX + id));
    const isWhole = conversation?.id === id && typeof conversation.title === "string" && Array.isArray(conversation.messages)
      && conversation.messages.every((message) => typeof message.content === "string" && ["user", "assistant"].includes(message.role));
    return isWhole ? conversation : null;
  } catch {
    return null;
  }
}

/** Keep a conversation; return false where the browser has no room left for it. */
export function save(conversation) {
  return put(kept, PREFIX + conversation.id, JSON.stringify(conversation));
}

/** Forget a conversation. */
export function remove(id) {
  kept.removeItem(PREFIX + id);
}

/** Call the listener with the id of a conversation that another tab changed. */
export function onOtherTab(listener) {
  addEventListener("storage", ({ key }) => key?.startsWith(PREFIX) && listener(key.slice(PREFIX.length)));
}

/** Return a name for a conversation: the first words of its first question. */
export function titleFrom(text) {
  const line = text.trim().split("\n")[0].replace(/\s+/g, " ");
  const letters = [...line];
  return letters.length <= 48 ? line : letters.slice(0, 47).join("").trimEnd() + "…";
}

/** Return the messages as the server wants them: no empty answers, and never two questions in a row. */
export function toSend(messages, system) {
  const turns = system ? [{ role: "system", content: system }] : [];
  for (const { role, content } of messages) {
    if (!content) continue;
    if (turns.at(-1)?.role === role) turns.at(-1).content += `\n\n${content}`;
    else turns.push({ role, content });
  }
  return turns;
}

/** Return a conversation as a page of Markdown. */
export function asMarkdown({ title, messages }) {
  const parts = messages.map(({ role, content }) => `## ${role === "user" ? "You" : "Model"}\n\n${content}\n`);
  return [`# ${title}\n`, ...parts].join("\n");
}

/** Return a conversation in the form of a request's `messages`. */
export function asJson({ title, messages }) {
  const turns = messages.map(({ role, content }) => ({ role, content }));
  return JSON.stringify({ title, messages: turns }, null, 2) + "\n";
}
