/** The chat page: one conversation is open, answers stream into theirs, and everything stays in this browser. */

import * as conversations from "./conversations.js";
import { streamAnswer, modelNames, Failure } from "./server.js";
import { apiKey, applyTheme, askForKey, change, openSettings, sampling, settings, switchTheme } from "./settings.js";
import { announce, copy, download, iconButton, make, noteOn, toast, viewOf, withoutThought } from "./view.js";

const $ = (id) => document.getElementById(id);
const prompt = $("prompt");
const scroller = $("scroller");
const tab = conversations.storage("sessionStorage"); // what is open, and what was typed but not sent

const runs = new Map(); // conversation's id -> { conversation, message, controller } of answers on their way
const deleted = new Set(); // ids
let views = new Map(); // message -> its view, of the open conversation
let open = conversations.fresh();
let editing = null; // the draft that waits while the last message is changed
let follows = true; // the newest text is kept in sight
let lastTop = 0; // how far the messages were scrolled
let isLeaving = false; // the page is being closed

// ---- the open conversation ----

function show(conversation) {
  stopEditing();
  open = conversation;
  follows = true;
  conversations.put(tab, "litgpt.open", open.id);
  prompt.value = tab.getItem(`litgpt.draft.${open.id}`) ?? "";
  grow();
  views = new Map();
  $("messages").replaceChildren();
  refresh();
}

/** Bring the page in line with the open conversation. */
function refresh() {
  const shown = new Set(open.messages);
  for (const [message, view] of views) {
    if (shown.has(message)) continue;
    view.element.remove();
    views.delete(message);
  }
  const run = runs.get(open.id);
  for (const message of open.messages) {
    if (!views.has(message)) {
      views.set(message, viewOf(message));
      $("messages").append(views.get(message).element);
    }
    views.get(message).update(run?.message === message);
  }
  $("messages").classList.toggle("running", Boolean(run));
  $("welcome").hidden = open.messages.length > 0;
  $("more").hidden = open.messages.length === 0;
  $("title").textContent = open.title || "New conversation";
  document.title = open.title ? `${open.title} – LitGPT chat` : "LitGPT chat";
  $("send").hidden = Boolean(run);
  $("stop").hidden = !run;
  showList();
  keepInSight();
}

function showList() {
  const items = conversations.all().map((conversation) => {
    const name = make("button", { type: "button", className: "row", title: conversation.title, textContent: conversation.title });
    name.dataset.action = "open";
    if (conversation.id === open.id) name.ariaCurrent = "page";
    const item = make("li", {}, [name, iconButton("delete", `Delete “${conversation.title}”`, "delete")]);
    item.classList.toggle("running", runs.has(conversation.id));
    item.dataset.id = conversation.id;
    return item;
  });
  const focused = document.activeElement?.closest("#conversations li")?.dataset.id;
  $("conversations").replaceChildren(...items);
  if (focused) items.find((item) => item.dataset.id === focused)?.firstElementChild.focus();
}

function keep(conversation) {
  if (deleted.has(conversation.id)) return;
  if (!conversations.save(conversation)) toast("This browser has no room left: the newest messages are lost when the page is closed. Delete or export conversations.");
}

const find = (id) => runs.get(id)?.conversation ?? conversations.read(id);

// ---- asking and answering ----

function send() {
  const text = prompt.value.trim();
  if (!text) return;
  if (runs.has(open.id)) return announce("An answer is on its way. Press Escape to stop it.");
  if (editing !== null) {
    open.messages.splice(lastQuestion());
    prompt.value = editing;
    stopEditing();
  } else {
    prompt.value = "";
  }
  keepDraft();
  grow();
  open.messages.push({ role: "user", content: text });
  open.title ||= conversations.titleFrom(text);
  follows = true;
  answer(open);
}

/** Ask for another answer to the last question; the present one stays until the first word of the new one. */
function again() {
  if (runs.has(open.id)) return;
  const last = open.messages.at(-1);
  answer(open, last.role === "assistant" ? open.messages.pop() : null);
}

async function answer(conversation, replaced = null) {
  const request = { messages: conversations.toSend(conversation.messages, settings().system), ...sampling() };
  const message = { role: "assistant", content: "" };
  const controller = new AbortController();
  conversation.messages.push(message);
  conversation.changed = Date.now();
  runs.set(conversation.id, { conversation, message, controller });
  keep(conversation);
  refresh();
  announce("The model is answering.");
  const failure = await receive(request, message, conversation, controller.signal).finally(() => runs.delete(conversation.id));
  if (isLeaving) return;
  if (failure) message.problem = failure.message;
  if (failure && !message.content && replaced?.content) {
    conversation.messages.splice(-1, 1, replaced);
    toast(failure.message);
  }
  conversation.changed = Date.now();
  keep(conversation);
  refresh();
  announce(`${withoutThought(message.content).answer} ${noteOn(message)}`.trim());
  if (failure?.needsKey && (await askForKey(failure.message))) {
    conversation.messages.pop();
    answer(conversation, replaced);
  }
}

/** Put what the server sends into the message; return the Failure that ended it early, if one did. */
async function receive(request, message, conversation, signal) {
  const asked = performance.now();
  let first = null;
  let saved = asked;
  try {
    if (!$("model").value) await fetchModels();
    for await (const { text, finish, usage } of streamAnswer({ model: $("model").value, ...request }, apiKey(), signal)) {
      const now = performance.now();
      if (finish) message.finish = finish;
      if (usage) message.tokens = usage.completion_tokens;
      if (!text) continue;
      first ??= now;
      message.content += text;
      message.seconds = (now - first) / 1000;
      paint(message);
      if (now - saved > 1000) {
        saved = now;
        keep(conversation);
      }
    }
  } catch (error) {
    if (error instanceof Failure) return error;
    if (error.name !== "AbortError") throw error;
    message.finish = "cancelled";
  }
  return null;
}

const waiting = new Set(); // messages that grew since the last frame

function paint(message) {
  if (waiting.size === 0) {
    requestAnimationFrame(() => {
      for (const each of waiting) if (runs.get(open.id)?.message === each) views.get(each)?.update(true);
      waiting.clear();
      keepInSight();
    });
  }
  waiting.add(message);
}

const stop = () => runs.get(open.id)?.controller.abort();
const lastQuestion = () => open.messages.findLastIndex((message) => message.role === "user");

function edit() {
  if (lastQuestion() === -1 || runs.has(open.id)) return;
  editing ??= prompt.value;
  prompt.value = open.messages[lastQuestion()].content;
  $("editing").hidden = false;
  grow();
  prompt.focus();
}

function stopEditing() {
  if (editing !== null) prompt.value = editing;
  editing = null;
  $("editing").hidden = true;
  grow();
}

// ---- the list of conversations ----

function startNew() {
  if (open.messages.length > 0) show(conversations.fresh());
  closeMenu();
  prompt.focus();
}

function forget(id) {
  const conversation = id === open.id ? open : find(id);
  deleted.add(id);
  runs.get(id)?.controller.abort();
  conversations.remove(id);
  if (id === open.id) show(conversations.fresh());
  else showList();
  prompt.focus();
  toast(`“${conversation.title}” is deleted.`, () => {
    deleted.delete(id);
    keep(conversation);
    show(conversation);
  });
}

function rename() {
  const dialog = $("name-dialog");
  const field = dialog.querySelector("input");
  field.value = open.title;
  dialog.returnValue = "";
  dialog.onclose = () => {
    if (dialog.returnValue !== "save" || !field.value.trim()) return;
    open.title = field.value.trim();
    keep(open);
    refresh();
  };
  dialog.showModal();
  field.select();
}

function exportAs(ending, text, type) {
  const name = open.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 60);
  download(`${name || "conversation"}.${ending}`, text, type);
}

const isNarrow = matchMedia("(max-width: 50rem)");

function openMenu() {
  document.body.classList.add("menu-open");
  $("shade").hidden = false;
  arrangeMenu();
  $("close-menu").focus();
}

function closeMenu() {
  if (!document.body.classList.contains("menu-open")) return;
  document.body.classList.remove("menu-open");
  $("shade").hidden = true;
  arrangeMenu();
  $("open-menu").focus();
}

/** Keep the focus out of what cannot be seen: the list beside a narrow page, or the page below the list. */
function arrangeMenu() {
  const isOpen = document.body.classList.contains("menu-open");
  $("sidebar").inert = isNarrow.matches && !isOpen;
  $("stage").inert = isNarrow.matches && isOpen;
  $("open-menu").ariaExpanded = String(isOpen);
}

// ---- models ----

async function fetchModels() {
  const names = await modelNames(apiKey());
  $("model").replaceChildren(...names.map((name) => make("option", { value: name, textContent: name })));
  $("model").value = names.includes(settings().model) ? settings().model : names[0];
  $("model").disabled = names.length < 2;
}

async function loadModels() {
  try {
    await fetchModels();
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    if (error.needsKey) {
      if (await askForKey(error.message)) loadModels();
    } else {
      toast(error.message);
    }
  }
}

// ---- the page's parts ----

function grow() {
  if (CSS.supports("field-sizing", "content")) return;
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

function keepDraft() {
  if (editing === null) conversations.put(tab, `litgpt.draft.${open.id}`, prompt.value);
}

function keepInSight() {
  if (follows) scroller.scrollTop = scroller.scrollHeight;
  offerEnd();
}

function offerEnd() {
  const button = $("to-end");
  if (follows && button === document.activeElement) prompt.focus(); // a hidden element would lose the focus to none
  button.hidden = follows;
}

function act(event) {
  const button = event.target.closest("button[data-action]");
  if (!button) return;
  const { action } = button.dataset;
  const message = [...views].find(([, view]) => view.element.contains(button))?.[0];
  const id = button.closest("li")?.dataset.id;
  if (action === "copy") copy(withoutThought(message.content).answer || message.content, button);
  if (action === "copy-code") copy(button.closest(".code").querySelector("code").textContent, button);
  if (action === "again") again();
  if (action === "edit") edit();
  if (action === "delete") forget(id);
  if (action === "open") {
    const conversation = find(id);
    if (conversation) show(conversation);
    closeMenu();
    if (!isNarrow.matches) prompt.focus(); // on a phone the keyboard would cover what was opened
  }
}

const on = (id, event, listener) => $(id).addEventListener(event, listener);
const onMenu = (id, listener) => on(id, "click", () => ($("menu").hidePopover(), listener()));

on("messages", "click", act);
on("conversations", "click", act);
on("new", "click", startNew);
on("stop", "click", stop);
on("cancel-edit", "click", () => (stopEditing(), prompt.focus()));
on("open-menu", "click", openMenu);
on("close-menu", "click", closeMenu);
on("shade", "click", closeMenu);
on("theme", "click", switchTheme);
on("open-settings", "click", () => openSettings(loadModels));
on("model", "change", () => change({ model: $("model").value }));
on("to-end", "click", () => ((follows = true), keepInSight(), prompt.focus()));
onMenu("rename", rename);
onMenu("export-text", () => exportAs("md", conversations.asMarkdown(open), "text/markdown"));
onMenu("export-json", () => exportAs("json", conversations.asJson(open), "application/json"));
onMenu("delete", () => forget(open.id));
on("composer", "submit", (event) => (event.preventDefault(), send()));
on("prompt", "input", () => (keepDraft(), grow()));
on("prompt", "keydown", (event) => {
  const isTouch = matchMedia("(hover: none) and (pointer: coarse)").matches; // its keyboard has no Shift+Enter
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !isTouch) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !prompt.value) {
    event.preventDefault();
    edit();
  }
});
scroller.addEventListener("scroll", () => {
  const isUpwards = scroller.scrollTop < lastTop;
  lastTop = scroller.scrollTop;
  follows = scroller.scrollHeight - lastTop - scroller.clientHeight < (isUpwards ? 2 : 60);
  offerEnd();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || document.querySelector("dialog[open], [popover]:popover-open")) return;
  if (document.body.classList.contains("menu-open")) closeMenu();
  else if (runs.has(open.id)) stop();
  else if (editing !== null) stopEditing();
});
document.addEventListener("click", ({ target }) => target.closest("dialog .cancel")?.closest("dialog").close("cancel"));
addEventListener("pagehide", () => {
  isLeaving = true; // the requests that end now did not fail
  runs.forEach(({ conversation }) => keep(conversation));
});
addEventListener("pageshow", ({ persisted }) => persisted && location.reload());
conversations.onOtherTab((id) => {
  const other = id === open.id && !runs.has(id) && conversations.read(id);
  if (other) {
    open = other;
    $("messages").replaceChildren();
    views = new Map();
    refresh();
  } else {
    showList();
  }
});
isNarrow.addEventListener("change", arrangeMenu);

applyTheme();
arrangeMenu();
const last = tab.getItem("litgpt.open");
show((last && conversations.read(last)) || (last ? { ...conversations.fresh(), id: last } : conversations.fresh()));
loadModels();
if (!isNarrow.matches) prompt.focus();
