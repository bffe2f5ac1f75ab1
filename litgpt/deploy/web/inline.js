/** The inside of Markdown's blocks: code, emphasis, links, as DOM nodes. Scanning is linear in the text's length. */

const SPECIAL = /[\\`*_~[\]!<\n$]|https?:\/\/|&(?:amp|lt|gt|quot|nbsp|#39);/g;
const BARE = /https?:\/\/[^\s<>"'`]+/y;
const ANGLED = /<(https?:\/\/[^\s<>]+)>/y;
const TARGET = /\(\s{0,9}(?:<([^<>\n]*)>|((?:[^\s()\\]|\\.|\([^\s()]*\))*))(?:\s{1,9}(?:"[^"]*"|'[^']*'))?\s{0,9}\)/y;
const MATH = { "\\(": "\\)", "\\[": "\\]", "$$": "$$" }; // shown as it is written
const ENTITIES = { "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&nbsp;": "\u00a0", "&#39;": "'" };
const ESCAPED = /[!-/:-@[-`{-~]/;

/** Return an element with children, whose text runs in the direction that its letters have. */
export function element(tag, children) {
  const made = document.createElement(tag);
  made.append(...children);
  if (/^(p|h\d|li|td|th)$/.test(tag)) made.dir = "auto"; // last: the browser looks at all the text again with each child
  return made;
}

/** What may be special in a text, by its first letter: each adds to the scan's pieces, and returns where to go on. */
const READERS = {
  "\\": (scan) => math(scan) ?? escaped(scan),
  "$": (scan) => math(scan) ?? plain(scan, "$"),
  "`": codeSpan,
  "\n": lineBreak,
  "h": (scan) => address(scan, BARE),
  "<": (scan) => address(scan, ANGLED),
  "[": (scan) => openBracket(scan, "["),
  "!": (scan) => (scan.text[scan.at + 1] === "[" ? openBracket(scan, "![") : plain(scan, "!")),
  "]": closeBracket,
  "*": emphasisMark,
  "_": emphasisMark,
  "~": emphasisMark,
  "&": (scan, mark) => plain(scan, mark, ENTITIES[mark]),
};

/** Return nodes of a paragraph's text: code, emphasis, links, line breaks. */
export function inline(text) {
  const scan = {
    text,
    at: 0,
    pieces: [], // nodes, and marks that may turn out to open or close an emphasis
    brackets: [], // where in `pieces` a link may have begun
    unclosed: new Set(), // what nothing closes any more: asked once, so that scanning stays linear
  };
  while (scan.at < text.length) {
    SPECIAL.lastIndex = scan.at;
    const special = SPECIAL.exec(text);
    const end = special ? special.index : text.length;
    if (end > scan.at) scan.at = plain(scan, text.slice(scan.at, end));
    if (special) scan.at = READERS[special[0][0]](scan, special[0]);
  }
  return emphasized(scan.pieces);
}

/** Add a text, as it is or as it shall be shown. */
function plain(scan, source, shown = source) {
  scan.pieces.push(document.createTextNode(shown));
  return scan.at + source.length;
}

function lineBreak({ at, pieces }) {
  const last = pieces.at(-1);
  if (last?.nodeType === Node.TEXT_NODE) last.data = last.data.trimEnd();
  pieces.push(document.createElement("br"));
  return at + 1;
}

function escaped(scan) {
  const letter = scan.text[scan.at + 1] ?? "";
  if (letter === "\n") return lineBreak({ ...scan, at: scan.at + 1 });
  return ESCAPED.test(letter) ? plain(scan, "\\" + letter, letter) : plain(scan, "\\");
}

/** Add a formula as it is written; return null where none stands. */
function math({ text, at, pieces, unclosed }) {
  const closer = MATH[text.slice(at, at + 2)];
  const end = closer && !unclosed.has(closer) ? text.indexOf(closer, at + 2) : -1;
  if (end === -1) {
    if (closer) unclosed.add(closer);
    return null;
  }
  pieces.push(Object.assign(document.createElement("span"), { className: "math", textContent: text.slice(at, end + 2) }));
  return end + 2;
}

/** Add the code between backticks, or the backticks themselves where nothing closes them. */
function codeSpan(scan) {
  const { text, at, pieces, unclosed } = scan;
  const start = runEnd(text, at);
  const run = text.slice(at, start);
  for (let end = start; !unclosed.has(run) && (end = text.indexOf(run, end)) !== -1; end = runEnd(text, end)) {
    if (runEnd(text, end) - end !== run.length) continue;
    const inside = text.slice(start, end).replaceAll("\n", " ");
    const isPadded = inside.startsWith(" ") && inside.endsWith(" ") && inside.trim();
    pieces.push(element("code", [isPadded ? inside.slice(1, -1) : inside]));
    return end + run.length;
  }
  unclosed.add(run);
  return plain(scan, run);
}

/** Return the index after all that is the same letter as the one at `at`. */
function runEnd(text, at) {
  let end = at;
  while (text[end] === text[at]) end++;
  return end;
}

/** Add a link to an address that stands in the text. */
function address(scan, pattern) {
  pattern.lastIndex = scan.at;
  const match = pattern.exec(scan.text);
  if (!match) return plain(scan, scan.text[scan.at]);
  const found = match[1] ?? trimmedAddress(match[0]);
  scan.pieces.push(link(found, [found]));
  return scan.at + (match[1] ? match[0] : found).length;
}

function openBracket(scan, mark) {
  scan.brackets.push({ index: scan.pieces.length, isImage: mark === "![" });
  return plain(scan, mark);
}

/** Turn what stands between brackets into a link if a target follows. */
function closeBracket(scan) {
  const { text, at, pieces, brackets } = scan;
  const opener = brackets.pop();
  TARGET.lastIndex = at + 1;
  const target = opener && TARGET.exec(text);
  if (!target) return plain(scan, "]");
  const inside = emphasized(pieces.splice(opener.index).slice(1));
  const href = (target[1] ?? target[2]).replace(/\\([!-/:-@[-`{-~])/g, "$1");
  if (opener.isImage) inside.unshift("Image: "); // shown as a link: the page loads nothing from elsewhere
  else brackets.length = 0; // no links inside of links
  pieces.push(link(href, inside));
  return at + 1 + target[0].length;
}

/** Return a link that opens another tab, or its words alone where the address is not a web page's. */
function link(href, children) {
  const isPage = /^https?:\/\//i.test(href) && URL.canParse(href);
  const made = element(isPage ? "a" : "span", children);
  if (isPage) Object.assign(made, { href, target: "_blank", rel: "noopener noreferrer nofollow" });
  return made;
}

/** Return an address found in running text without the punctuation of the sentence around it. */
function trimmedAddress(found) {
  let end = found.length;
  let open = 0;
  for (const letter of found) open += letter === "(" ? 1 : letter === ")" ? -1 : 0;
  while (end > 0 && (/[.,;:!?*_~\]]/.test(found[end - 1]) || (found[end - 1] === ")" && open < 0))) {
    if (found[--end] === ")") open++;
  }
  return found.slice(0, end);
}

const isSpace = (letter) => !letter || /\s/.test(letter);
const isPunctuation = (letter) => Boolean(letter) && /[\p{P}\p{S}]/u.test(letter);

/** Add a run of `*`, `_` or `~` with whether it may open or close (CommonMark, section 6.2). */
function emphasisMark({ text, at, pieces }) {
  const letter = text[at];
  const after = runEnd(text, at);
  const [before, next] = [text[at - 1], text[after]];
  const isLeft = !isSpace(next) && (!isPunctuation(next) || isSpace(before) || isPunctuation(before));
  const isRight = !isSpace(before) && (!isPunctuation(before) || isSpace(next) || isPunctuation(next));
  const inWord = letter === "_" && isLeft && isRight;
  const count = after - at;
  const counts = letter === "~" ? count === 2 : true;
  pieces.push({
    letter, count,
    opens: counts && isLeft && (!inWord || isPunctuation(before)),
    closes: counts && isRight && (!inWord || isPunctuation(next)),
  });
  return after;
}

/** Return the nodes in which marks that fit each other have become elements, and other marks text. */
function emphasized(pieces) {
  const out = [];
  const openers = []; // marks in `out` that wait for their closing twin
  const waiting = { "*": 0, "_": 0, "~": 0 };
  const drop = () => waiting[openers.pop().mark.letter]--;
  for (const piece of pieces) {
    if (piece instanceof Node) {
      out.push(piece);
      continue;
    }
    const mark = { ...piece };
    while (mark.closes && mark.count > 0 && waiting[mark.letter] > 0) {
      while (openers.at(-1).mark.letter !== mark.letter) drop();
      const { mark: opener, index } = openers.at(-1);
      const used = Math.min(2, mark.count, opener.count);
      const made = element(mark.letter === "~" ? "del" : used === 2 ? "strong" : "em", asNodes(out.splice(index + 1)));
      opener.count -= used;
      mark.count -= used;
      if (opener.count === 0) {
        drop();
        out.pop();
      }
      out.push(made);
    }
    if (mark.count === 0) continue;
    if (mark.opens) {
      openers.push({ mark, index: out.length });
      waiting[mark.letter]++;
    }
    out.push(mark);
  }
  return asNodes(out);
}

function asNodes(parts) {
  return parts.map((part) => (part instanceof Node ? part : document.createTextNode(part.letter.repeat(part.count))));
}
