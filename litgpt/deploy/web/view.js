/** How messages look, and how the page tells the reader that something happened. */

import { Markdown } from "./markdown.js";

const NOTES = {
  length: "The answer reached its token limit.",
  cancelled: "You stopped this answer.",
  timeout: "The server’s time limit ended this answer.",
  empty: "The answer is empty.",
  left: "The page was closed before the answer was complete.",
};

/** Return an element with properties and children. */
export function make(tag, properties = {}, children = []) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** Return one of the page's icons. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** Return a button that shows an icon and is named for those who do not see it. */
export function iconButton(name, label, action) {
  const button = make("button", { type: "button", className: "icon", ariaLabel: label, title: label }, [icon(name)]);
  button.dataset.action = action;
  return button;
}

/** Return a view of a message: its `element`, and `update(isRunning)` to call when the message changed. */
export function viewOf(message) {
  return message.role === "user" ? new Question(message) : new Answer(message);
}

class Question {
  constructor(message) {
    const bubble = make("div", { className: "bubble", dir: "auto", textContent: message.content });
    const actions = make("div", { className: "actions" }, [iconButton("copy", "Copy", "copy"), iconButton("edit", "Edit and send again", "edit")]);
    this.element = make("article", { className: "message user", ariaLabel: "You" }, [bubble, actions]);
  }
  update() {}
}

class Answer {
  constructor(message) {
    this.message = message;
    this.thought = make("details", { className: "thought", hidden: true }, [make("summary", { textContent: "Thoughts" }), make("div", { className: "prose" })]);
    this.body = make("div", { className: "prose" });
    this.waiting = make("p", { className: "waiting", hidden: true }, [make("span"), make("span"), make("span")]);
    this.note = make("p", { className: "note", hidden: true });
    this.stats = make("span", { className: "stats" });
    this.actions = make("div", { className: "actions" }, [iconButton("copy", "Copy", "copy"), iconButton("again", "Answer again", "again"), this.stats]);
    const parts = [this.thought, this.body, this.waiting, this.note, this.actions];
    this.element = make("article", { className: "message answer", ariaLabel: "Answer" }, parts);
    this.thoughtText = new Markdown(this.thought.lastElementChild);
    this.bodyText = new Markdown(this.body);
  }

  update(isRunning) {
    const { content, problem } = this.message;
    const { thought, answer, isThinking } = withoutThought(content);
    this.thought.hidden = !thought;
    this.thought.firstElementChild.textContent = isThinking && isRunning ? "Thinking…" : "Thoughts";
    this.thoughtText.show(thought);
    this.bodyText.show(answer);
    this.waiting.hidden = !isRunning || Boolean(answer);
    this.element.ariaBusy = isRunning ? "true" : "false";
    this.actions.hidden = isRunning || !content;
    const note = isRunning ? "" : noteOn(this.message);
    this.note.hidden = !note;
    this.note.className = problem ? "note problem" : "note";
    this.note.replaceChildren(...(note ? [note] : []));
    if (note && (problem || !content)) {
      const again = make("button", { type: "button", className: "plain", textContent: "Try again" });
      again.dataset.action = "again";
      this.note.append(" ", again);
    }
    this.stats.textContent = isRunning ? "" : statistics(this.message);
  }
}

/** Return what the reader should know about how an answer ended, or an empty text. */
export function noteOn({ content, problem, finish }) {
  return problem ?? (finish ? NOTES[finish] : NOTES.left) ?? (content ? "" : NOTES.empty);
}

/** Return how many tokens the answer has, and how fast they came. */
function statistics({ tokens, seconds }) {
  if (!tokens) return "";
  const count = `${tokens.toLocaleString("en")} ${tokens === 1 ? "token" : "tokens"}`;
  const rate = (tokens - 1) / seconds;
  return tokens > 1 && seconds > 0 ? `${count} · ${rate < 10 ? rate.toFixed(1) : Math.round(rate).toLocaleString("en")} per second` : count;
}

/** Return the thought that a reasoning model puts before its answer, and the answer. */
export function withoutThought(content) {
  const inner = content.trimStart().replace(/^<think>/, "");
  const isOpened = inner !== content.trimStart();
  const end = inner.indexOf("</think>");
  if (end === -1) return isOpened ? { thought: inner.trim(), answer: "", isThinking: true } : { thought: "", answer: content, isThinking: false };
  return { thought: inner.slice(0, end).trim(), answer: inner.slice(end + "</think>".length).trimStart(), isThinking: false };
}

/** Put a text on the clipboard and show on the button that it is there. */
export async function copy(text, button) {
  if (!(await written(text))) return announce("The browser did not allow copying.");
  announce("Copied.");
  const before = [...button.childNodes];
  button.replaceChildren(before[0].nodeType === Node.TEXT_NODE ? "Copied" : icon("done"));
  setTimeout(() => button.replaceChildren(...before), 1500);
}

async function written(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text).then(() => true, () => false);
  const field = make("textarea", { value: text, className: "unseen" }); // plain HTTP from another machine has no clipboard
  document.body.append(field);
  field.select();
  const isDone = document.execCommand("copy");
  field.remove();
  return isDone;
}

/** Offer a text as a file. */
export function download(name, text, type) {
  const href = URL.createObjectURL(new Blob([text], { type }));
  make("a", { href, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10_000);
}

/** Tell readers who listen to the page what changed. */
export function announce(words) {
  document.getElementById("announcer").textContent = words;
}

let hiding = 0;

/** Show a sentence at the page's lower end for some seconds; with `undo`, offer to take the act back. */
export function toast(words, undo = null) {
  const box = document.getElementById("toast");
  const button = document.getElementById("undo");
  clearTimeout(hiding);
  box.hidden = false;
  box.firstElementChild.textContent = words;
  button.hidden = !undo;
  button.onclick = () => {
    box.hidden = true;
    undo();
  };
  hiding = setTimeout(() => (box.hidden = true), 8000);
}
