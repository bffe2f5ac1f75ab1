/** What the page asks its server: the models there are, and answers as they are made. */

/** Something that kept an answer from coming, in words for the reader. */
export class Failure extends Error {
  constructor(words, { needsKey = false, wait = null } = {}) {
    super(words);
    this.needsKey = needsKey;
    this.wait = wait; // seconds that the server asks for before the next attempt
  }
}

/** Return the names under which the server answers, its own model first. */
export async function modelNames(key) {
  const answer = await ask("v1/models", { headers: headers(key) }, key);
  const { data } = await answer.json();
  return data.map((model) => model.id);
}

/**
 * Yield what a streamed answer consists of: {text}, {finish} and {usage}, as they come.
 *
 * Throws a Failure in plain words, or an AbortError when the signal ends it.
 */
export async function* streamAnswer(request, key, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const init = { method: "POST", headers: { ...headers(key), "Content-Type": "application/json" }, body, signal };
  const answer = await ask("v1/chat/completions", init, key);
  let isComplete = false;
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") return;
    const chunk = parsed(data);
    if (chunk.error) throw new Failure(`The server broke off: ${chunk.error.message ?? "it did not say why."}`);
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) {
      isComplete = true;
      yield { finish: choice.finish_reason };
    }
    if (chunk.usage) yield { usage: chunk.usage };
  }
  if (!isComplete) throw broken();
}

const broken = () => new Failure("The connection broke off before the answer was complete. What had arrived is kept.");
const headers = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new Failure("The server sent something that this page cannot read. Reload the page and try again.");
  }
}

async function ask(path, init, key) {
  let answer;
  try {
    answer = await fetch(path, { ...init, credentials: "same-origin", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server cannot be reached. Check that it is running and that you are online.");
  }
  if (!answer.ok) throw await refusal(answer, key);
  return answer;
}

/** Return why the server refused, in words for the reader. */
async function refusal(answer, key) {
  const said = await answer.text().catch(() => "");
  let reason = "";
  try {
    reason = JSON.parse(said).error.message;
  } catch {
    reason = ""; // a proxy's page, or nothing
  }
  if (answer.status === 401) {
    return new Failure(key ? "The server does not accept this API key." : "This server asks for an API key.", { needsKey: true });
  }
  if (answer.status === 429) {
    const wait = Math.ceil(Number(answer.headers.get("Retry-After"))) || 1;
    return new Failure(`The server is busy. It asks to wait ${wait} ${wait === 1 ? "second" : "seconds"}.`, { wait });
  }
  if (answer.status === 503) return new Failure(`The server cannot answer now. ${reason || "It may be starting or stopping: try again soon."}`);
  if (answer.status >= 500) return new Failure(`The server failed (${answer.status}). ${reason}`.trim());
  return new Failure(`The server refused this (${answer.status}). ${reason}`.trim());
}

/** Yield the data of each server-sent event (WHATWG HTML, section 9.2.6). */
async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : broken();
      });
      if (done) return;
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim(); // one line an event: JSON has no line breaks
    }
  } finally {
    reader.cancel().catch(() => {}); // already closed
  }
}
