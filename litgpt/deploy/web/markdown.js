/**
 * Markdown to DOM nodes. Text becomes text nodes and nothing is parsed as HTML, so a model cannot put markup, styles or
 * requests into the page. All scanning is linear in the text's length, whatever the text.
 */

import { element, inline } from "./inline.js";

const MAX_DEPTH = 12; // of lists and quotes in each other; deeper ones are shown as text
const FENCE = /^([ \t]*)(`{3,}|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+|$)/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;
const UNDERLINE = /^ {0,3}(={3,}|-{3,})[ \t]*$/;
const DIVIDERS = /^\|?:?-+:?(?:\|:?-+:?)*\|?$/; // below a table's head, without its spaces

/** Shows a text that grows: only the blocks that changed since the last call are made again. */
export class Markdown {
  constructor(element) {
    this.element = element;
    this.shown = []; // the source of each block, in the order of the element's children
  }

  /** Make the element show the text. */
  show(text) {
    const sources = split(text.replaceAll("\r\n", "\n").split("\n"));
    let same = 0;
    while (same < sources.length && sources[same] === this.shown[same]) same++;
    while (this.element.children.length > same) this.element.lastElementChild.remove();
    for (const source of sources.slice(same)) this.element.append(block(source.split("\n"), 0));
    this.shown = sources;
  }
}

/** Return the sources of the blocks that the lines hold, one after the other. */
function split(lines) {
  const sources = [];
  for (let start = 0; start < lines.length; ) {
    if (!lines[start].trim()) {
      start++;
      continue;
    }
    const end = blockEnd(lines, start);
    sources.push(lines.slice(start, end).join("\n").trimEnd());
    start = end;
  }
  return sources;
}

/** Return the index of the first line after the block that begins at `start`. */
function blockEnd(lines, start) {
  const line = lines[start];
  if (fenceOf(line)) return fenceEnd(lines, start, fenceOf(line)[2]);
  if (HEADING.test(line) || RULE.test(line)) return start + 1;
  if (ITEM.test(line)) return listEnd(lines, start);
  if (isTable(lines, start)) return lineAfter(lines, start + 2, (next) => next.trim() && next.includes("|"));
  if (QUOTE.test(line)) return lineAfter(lines, start + 1, (next) => QUOTE.test(next) || (next.trim() && !begins(next)));
  for (let end = start + 1; ; end++) {
    if (end < lines.length && UNDERLINE.test(lines[end])) return end + 1;
    if (end >= lines.length || !lines[end].trim() || begins(lines[end]) || isTable(lines, end)) return end;
  }
}

function lineAfter(lines, index, belongs) {
  while (index < lines.length && belongs(lines[index])) index++;
  return index;
}

/** Return whether a line begins another block than a paragraph. */
function begins(line) {
  return Boolean(fenceOf(line)) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);
}

/** Return the parts of a line that opens a code block, or null. */
function fenceOf(line) {
  const match = FENCE.exec(line);
  return match && !(match[2][0] === "`" && match[3].includes("`")) ? match : null;
}

function fenceEnd(lines, start, fence) {
  for (let index = start + 1; index < lines.length; index++) if (closes(lines[index], fence)) return index + 1;
  return lines.length;
}

function closes(line, fence) {
  const text = line.trim();
  return text.length >= fence.length && text === fence[0].repeat(text.length);
}

function isTable(lines, start) {
  return lines[start].includes("|") && start + 1 < lines.length && lines[start + 1].includes("-") && lines[start + 1].includes("|")
    && DIVIDERS.test(lines[start + 1].replace(/\s+/g, "")) && cells(lines[start]).length === cells(lines[start + 1]).length;
}

const isOrdered = (item) => item[2].length > 1;
const indentOf = (line) => line.length - line.trimStart().length;

/** Return the end of a list: items of one kind, lines indented below them, and lines that go on with their paragraphs. */
function listEnd(lines, start) {
  const first = ITEM.exec(lines[start]);
  for (let index = afterLine(lines, start); ; ) {
    const next = lineAfter(lines, index, (line) => !line.trim());
    if (next >= lines.length) return lines.length;
    const line = lines[next];
    const isIndented = indentOf(line) > first[1].length;
    const isSibling = ITEM.exec(line)?.[2].at(-1) === first[2].at(-1) && !RULE.test(line);
    if (!isIndented && !isSibling && (next > index || begins(line))) return index;
    index = afterLine(lines, next);
  }
}

/** Return the index after a line of a list, or after the code block that begins in it. */
function afterLine(lines, index) {
  const fence = fenceOf(lines[index].replace(ITEM, ""));
  return fence ? fenceEnd(lines, index, fence[2]) : index + 1;
}

/** Return whether empty lines stand between two of the blocks that the lines hold. */
function hasGap(lines) {
  for (let start = 0, isFirst = true; start < lines.length; isFirst = false) {
    const next = lineAfter(lines, start, (line) => !line.trim());
    if (next > start && next < lines.length && !isFirst) return true;
    start = next < lines.length ? blockEnd(lines, next) : next;
  }
  return false;
}

/** Return the element of one block. */
function block(lines, depth) {
  const line = lines[0];
  const fence = fenceOf(line);
  if (fence) return codeBlock(lines, fence);
  if (HEADING.test(line)) {
    const level = HEADING.exec(line)[1].length;
    return element(`h${Math.min(level + 2, 6)}`, inline(line.replace(HEADING, "").trimEnd().replace(/(^|[ \t])#+$/, "")));
  }
  if (RULE.test(line)) return document.createElement("hr");
  if (ITEM.test(line) && depth < MAX_DEPTH) return list(lines, depth);
  if (isTable(lines, 0)) return table(lines);
  if (QUOTE.test(line) && depth < MAX_DEPTH) {
    return element("blockquote", blocks(lines.map((each) => each.replace(QUOTE, "")), depth + 1));
  }
  const underline = lines.length > 1 && UNDERLINE.exec(lines.at(-1));
  const text = lines.slice(0, underline ? -1 : undefined).map((each) => each.trimStart()).join("\n");
  return element(underline ? (underline[1][0] === "=" ? "h3" : "h4") : "p", inline(text.trimEnd()));
}

function blocks(lines, depth) {
  return split(lines).map((source) => block(source.split("\n"), depth));
}

function codeBlock(lines, [, indent, fence, info]) {
  const isClosed = lines.length > 1 && closes(lines.at(-1), fence);
  const margin = new RegExp(`^ {0,${indent.length}}`);
  const source = lines.slice(1, isClosed ? -1 : undefined).map((line) => line.replace(margin, ""));
  const language = info.trim().split(/\s/)[0].slice(0, 40);
  const name = document.createElement("span");
  name.textContent = language || "text";
  const copy = document.createElement("button");
  Object.assign(copy, { type: "button", textContent: "Copy" });
  copy.dataset.action = "copy-code";
  const bar = element("div", [name, copy]);
  bar.className = "bar";
  const code = document.createElement("code");
  code.textContent = source.join("\n");
  const pre = element("pre", [code]);
  Object.assign(pre, { tabIndex: 0, dir: "ltr" }); // can be scrolled from the keyboard
  const box = element("div", [bar, pre]);
  box.className = "code";
  return box;
}

function list(lines, depth) {
  const first = ITEM.exec(lines[0]);
  const made = document.createElement(isOrdered(first) ? "ol" : "ul");
  if (isOrdered(first)) made.start = parseInt(first[2], 10);
  const items = [];
  let fence = null; // lines of a code block are never items
  for (const line of lines) {
    const item = fence ? null : ITEM.exec(line);
    if (item && item[1].length <= first[1].length) {
      const text = line.slice(item[0].length);
      items.push({ width: item[0].length, lines: [text] });
      fence = fenceOf(text)?.[2] ?? null;
      continue;
    }
    const { width, lines: own } = items.at(-1);
    own.push(line.slice(Math.min(indentOf(line), width)));
    if (fence) fence = closes(line, fence) ? null : fence;
    else fence = fenceOf(line)?.[2] ?? null;
  }
  const isLoose = items.some(({ lines: own }, index) => hasGap(index < items.length - 1 ? [...own, "the next item"] : own));
  made.classList.toggle("loose", isLoose);
  made.append(...items.map(({ lines: own }) => listItem(own, isLoose, depth)));
  return made;
}

function listItem(lines, isLoose, depth) {
  const task = /^\[([ xX])\][ \t]+/.exec(lines[0]);
  if (task) lines[0] = lines[0].slice(task[0].length);
  const parts = blocks(lines, depth + 1);
  const children = !isLoose && parts[0]?.tagName === "P" ? [...parts[0].childNodes, ...parts.slice(1)] : parts;
  if (task) {
    const box = document.createElement("input");
    Object.assign(box, { type: "checkbox", disabled: true, checked: task[1] !== " ", ariaLabel: task[1] === " " ? "to do" : "done" });
    children.unshift(box, " ");
  }
  return element("li", children);
}

/** Return the texts of a table row's cells; a `|` behind a backslash or inside backticks is part of a cell. */
function cells(line) {
  const found = line.trim().replace(/^\|/, "").match(/(?:\\.|`[^`]*`|[^|])+|\|/g) ?? [];
  const texts = [""];
  for (const part of found) {
    if (part === "|") texts.push("");
    else texts[texts.length - 1] += part;
  }
  if (texts.length > 1 && !texts.at(-1).trim()) texts.pop();
  return texts.map((text) => text.trim().replaceAll("\\|", "|"));
}

function table(lines) {
  const sides = cells(lines[1]).map((text) => (text.endsWith(":") ? (text.startsWith(":") ? "center" : "right") : "left"));
  const row = (line, tag) => {
    const texts = cells(line).slice(0, sides.length);
    return element("tr", sides.map((side, column) => {
      const cell = element(tag, inline(texts[column] ?? ""));
      cell.className = side;
      return cell;
    }));
  };
  const head = element("thead", [row(lines[0], "th")]);
  const body = element("tbody", lines.slice(2).map((line) => row(line, "td")));
  const box = element("div", [element("table", [head, body])]);
  Object.assign(box, { className: "table", tabIndex: 0, role: "region", ariaLabel: "Table" });
  return box;
}
