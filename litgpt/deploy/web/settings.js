/** What the reader sets: how answers are drawn, the system prompt, the key, the appearance. */

import { put, storage } from "./conversations.js";

const NAME = "litgpt.settings";
const KEY = "litgpt.key";
const kept = storage("localStorage");
const forgotten = storage("sessionStorage"); // when the tab is closed
const dialog = document.getElementById("settings");
const form = dialog.querySelector("form");

/** Return the settings that were saved, by the names of their fields. */
export function settings() {
  try {
    const saved = JSON.parse(kept.getItem(NAME));
    return saved && typeof saved === "object" ? saved : {};
  } catch {
    return {};
  }
}

/** Change some of the settings. */
export function change(changes) {
  put(kept, NAME, JSON.stringify({ ...settings(), ...changes }));
  applyTheme();
}

/** Return the API key, or an empty text. */
export const apiKey = () => forgotten.getItem(KEY) ?? "";

/** Return the fields of a request that the reader has set; the server's defaults hold for all others. */
export function sampling() {
  const saved = settings();
  const numbers = [...form.querySelectorAll("input[type=number]")].map((input) => input.name);
  return Object.fromEntries(numbers.filter((name) => typeof saved[name] === "number").map((name) => [name, saved[name]]));
}

/** Show light or dark as the reader chose. */
export function applyTheme() {
  const { theme } = settings();
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}

/** Switch between light and dark. */
export function switchTheme() {
  const isDark = settings().theme ? settings().theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  change({ theme: isDark ? "light" : "dark" });
}

/** Show the settings; call `onSaved` once they changed. */
export function openSettings(onSaved) {
  fill({ ...settings(), key: apiKey() });
  dialog.returnValue = "";
  dialog.onclose = () => {
    if (dialog.returnValue !== "save") return;
    const values = Object.fromEntries([...form.elements].filter((field) => field.name).map((field) => [field.name, valueOf(field)]));
    put(forgotten, KEY, values.key);
    delete values.key;
    change(values);
    onSaved();
  };
  dialog.showModal();
}

let asking = null;

/** Ask for the key; return whether one was given. Whoever asks meanwhile hears the same answer. */
export function askForKey(reason) {
  asking ??= keyFromReader(reason).finally(() => (asking = null));
  return asking;
}

function keyFromReader(reason) {
  const box = document.getElementById("key-dialog");
  const field = box.querySelector("input");
  document.getElementById("key-reason").textContent = reason;
  field.value = "";
  box.returnValue = "";
  box.showModal();
  return new Promise((resolve) => {
    box.onclose = () => {
      const isGiven = box.returnValue === "save";
      if (isGiven) put(forgotten, KEY, field.value.trim());
      resolve(isGiven);
    };
  });
}

function valueOf(field) {
  const text = field.value.trim();
  return field.type === "number" ? (text === "" ? null : Number(text)) : text;
}

function fill(values) {
  for (const field of form.elements) if (field.name) field.value = values[field.name] ?? "";
}

document.getElementById("reset").addEventListener("click", () => {
  for (const field of form.querySelectorAll("input[type=number], textarea")) field.value = "";
});
