// The dashboard without scripts shows everything; this script adds search, filters, actions, keys and live figures.
// It makes elements and sets texts; it never parses HTML, and the pages' policy would not let it.
"use strict";

const root = document.body.dataset.root;
const api = document.body.dataset.api;
document.documentElement.classList.add("scripts");

const status = document.getElementById("status");
const say = (text) => { status.textContent = text; };

const again = () => location.replace(location.pathname + location.search);

function make(name, text, attributes = {}) {
  const element = document.createElement(name);
  if (text) element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

// --- requests ---------------------------------------------------------------------------------------------

async function send(call, body) {
  const [method, path] = call.split(" ");
  const sent = method === "GET" ? {} : { headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const answer = await fetch(api + path, { method, redirect: "error", ...sent });
  const lines = (await answer.text()).trim().split("\n");
  let value = {};
  try { value = JSON.parse(lines[lines.length - 1] || "{}"); } catch { /* an answer of a proxy */ }
  if (value.error?.message) throw new Error([value.error.message, value.error.hint].filter(Boolean).join(": "));
  if (!answer.ok) throw new Error(`the relay answered ${answer.status}`);
  return typeof value.result === "object" && value.result ? value.result : value; // a test has a word there
}

// --- actions ----------------------------------------------------------------------------------------------

function confirmed(button, lines) {
  const label = button.textContent;
  const dialog = make("dialog", "", { "aria-labelledby": "question", "aria-describedby": "effect" });
  const effect = make("div", "", { id: "effect" });
  const menu = make("menu");
  const yes = make("button", label, { type: "button" });
  const no = make("button", "Go back", { type: "button" });
  yes.classList.toggle("danger", button.classList.contains("danger"));
  menu.append(no, yes);
  effect.append(...lines.map((line) => make("p", line)));
  dialog.append(make("h2", `${label}?`, { id: "question" }), effect,
    make("code", button.dataset.command, { class: "command" }), menu);
  document.body.append(dialog);
  return new Promise((resolve) => {
    let answer = false;
    yes.addEventListener("click", () => { answer = true; dialog.close(); });
    no.addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => { dialog.remove(); resolve(answer); });
    dialog.showModal();
    no.focus();
  });
}

async function act(button) {
  const { call, count, counts, pace } = button.dataset;
  const body = JSON.parse(button.dataset.body);
  button.disabled = true;
  try {
    const lines = count ? [`${count[0].toUpperCase()}${count.slice(1)}.`] : [];
    if (counts !== undefined) {
      const found = await send(call, { ...body, dry_run: true });
      const [one, many] = (button.dataset.nouns || "delivery deliveries").split(" ");
      const what = found.count === 1 ? one : many;
      const takes = found.count < pace ? "less than 1 s" : `about ${duration(found.count / pace)}`;
      lines.unshift(`${found.count.toLocaleString("en")} ${what} selected${pace ? `, in ${takes} at ${pace}/s` : ""}.`);
    }
    button.disabled = false;
    if (!await confirmed(button, lines)) return;
    button.disabled = true;
    const result = await send(call, body);
    sessionStorage.setItem("said", `${button.textContent}: ${summary(result)}`);
    sessionStorage.setItem("focus", button.dataset.call + button.dataset.body);
    if (/^rpl_/.test(result.id) && result.state) location.href = `${root}replays/${result.id}`;
    else if (/^evt_/.test(result.event_id)) location.href = `${root}events/${result.event_id}`;
    else again();
  } catch (error) {
    say(`${button.textContent} failed: ${error.message}`);
  } finally {
    button.disabled = false;
    button.focus();
  }
}

// A test of a destination has a verdict in words; other results are numbers and words by name.
function summary(result) {
  if (/^rpl_/.test(result.id) && result.state) return "started";
  if (result.verdict) {
    const steps = Object.entries(result.timing_ms || {}).filter(([, value]) => value !== null)
      .map(([name, value]) => `${name.replaceAll("_", " ")} ${value} ms`);
    const details = [result.error || `HTTP ${result.status}`, ...steps, `${result.duration_ms} ms in all`].join(", ");
    return [`${result.verdict} (${details})`, result.hint].filter(Boolean).join("; ");
  }
  const parts = Object.entries(result).filter(([, value]) => typeof value === "number")
    .map(([name, value]) => `${name.replaceAll("_", " ")} ${value.toLocaleString("en")}`);
  const failed = Array.isArray(result.items) && result.items.find((each) => each.error);
  return ["done", ...parts.slice(0, 4), failed && failed.error].filter(Boolean).join(", ");
}

function afterReload() {
  const said = sessionStorage.getItem("said");
  if (said) say(said);
  const focus = sessionStorage.getItem("focus");
  const same = [...document.querySelectorAll("button[data-call]")]
    .find((each) => each.dataset.call + each.dataset.body === focus);
  if (focus) (same || document.getElementById("main")).focus();
  sessionStorage.removeItem("said");
  sessionStorage.removeItem("focus");
}

// --- selected rows ----------------------------------------------------------------------------------------

const boxes = () => [...document.querySelectorAll("tbody input[name=id]")];

// The buttons below a list change only the selected rows; each shows the number of rows and has their ids.
function selected() {
  const bar = document.querySelector(".selected");
  if (!bar) return;
  const ids = boxes().filter((box) => box.checked).map((box) => box.value);
  bar.classList.toggle("some", ids.length > 0);
  bar.querySelector("[data-select]").textContent = ids.length ? "Clear the selection" : "Select all on this page";
  for (const button of bar.querySelectorAll("[data-selected]")) {
    const { selected: label, call } = button.dataset;
    button.disabled = !ids.length;
    button.textContent = `${label} ${ids.length.toLocaleString("en")} selected`;
    button.dataset.body = JSON.stringify({ ids });
    button.dataset.command = ["relay", ...call.split(" ")[1].split("/"), ...ids].join(" ");
  }
}

function selectAll() {
  const all = boxes();
  const none = !all.some((box) => box.checked);
  for (const box of all) box.checked = none;
  selected();
}

document.addEventListener("change", (event) => { if (event.target.name === "id") selected(); });

// --- requests that change nothing -------------------------------------------------------------------------

const text = (value) => (value === null ? "–" : typeof value === "object" ? JSON.stringify(value) : String(value));

// Checks that failed come first; each has its hint below its detail.
function rows(list) {
  list.sort((one, other) => (one.ok === true) - (other.ok === true));
  const isChecks = "ok" in list[0];
  const names = Object.keys(list[0]).filter((name) => !isChecks || name !== "hint");
  const table = make("table", "", isChecks ? { class: "lined" } : {});
  const head = table.createTHead().insertRow();
  for (const name of names) {
    head.append(make("th", name === "ok" ? "result" : name.replaceAll("_", " "), { scope: "col" }));
  }
  const body = table.createTBody();
  for (const each of list) {
    const row = body.insertRow();
    for (const [index, name] of names.entries()) {
      const good = typeof each[name] === "boolean";
      const cell = make(index ? "td" : "th", good ? (each[name] ? "✔ yes" : "✖ no") : text(each[name]),
        index ? { "data-head": isChecks ? "" : name } : { scope: "row" });
      if (name === "ok") {
        cell.textContent = each.ok ? "✔ ok" : "✖ failed";
        cell.classList.add("lead");
      }
      if (good) cell.classList.add(each[name] ? "good" : "bad");
      if (isChecks && name === "detail" && each.hint) cell.append(make("div", each.hint, { class: "note" }));
      row.append(cell);
    }
  }
  return table;
}

async function ask(button) {
  const output = button.nextElementSibling;
  button.disabled = true;
  output.replaceChildren(make("p", "Please wait …"));
  try {
    const result = await send(button.dataset.ask, JSON.parse(button.dataset.body));
    const parts = [];
    const lists = Object.entries(result).filter(([name, value]) => Array.isArray(value) && name !== "warnings");
    if (lists.length && !lists.some(([, value]) => value.length)) parts.push(make("p", "✔ No differences.", { class: "good" }));
    for (const [name, value] of Object.entries(result)) {
      if (Array.isArray(value) && !value.length) continue;
      const failed = Array.isArray(value) ? value.filter((each) => each.ok === false).length : 0;
      if (failed) parts.push(make("p", `✖ ${failed} of ${value.length} failed.`, { class: "bad" }));
      else if (Array.isArray(value) && value[0].ok) parts.push(make("p", `✔ All ${value.length} passed.`, { class: "good" }));
      if (Array.isArray(value) && typeof value[0] === "object") parts.push(rows(value));
      else parts.push(make("p", `${name.replaceAll("_", " ")}: ${Array.isArray(value) ? value.join(", ") : text(value)}`));
    }
    output.replaceChildren(...parts);
  } catch (error) {
    output.replaceChildren(make("p", error.message, { class: "error" }));
  } finally {
    button.disabled = false;
    button.focus();
  }
}

// --- logging in and out -----------------------------------------------------------------------------------

async function login(method, body) {
  const answer = await fetch(`${root}login`, {
    method, headers: { "Content-Type": "application/json" }, body: body && JSON.stringify(body), redirect: "error",
  });
  const value = await answer.json();
  if (value.error) throw new Error([value.error.message, value.error.hint].filter(Boolean).join(": "));
  return value;
}

async function begin(body) {
  try {
    await login("POST", body);
    again();
  } catch (error) {
    say(`Not logged in: ${error.message}`);
  }
}

async function arrive() {
  const code = /^#code=([\w-]+)$/.exec(location.hash);
  const asked = document.querySelector("[data-login]");
  if (code) history.replaceState(null, "", location.pathname + location.search);
  if (!code && !asked) return;
  // A link on another site sends no cookie; the page itself can ask whether this browser has logged in.
  // A code in somebody's link must not replace a login.
  const state = await login("GET");
  if (code && state.logged_in) sessionStorage.setItem("said", "You are logged in already; the code was not used.");
  if (!state.logged_in && code) await begin({ code: code[1] });
  else if (state.logged_in) again();
}

// --- copies -----------------------------------------------------------------------------------------------

// Browsers offer the clipboard only on https and loopback.
function copy({ dataset: { copy: text, copyFrom: id } }) {
  const copied = text || document.getElementById(id).textContent;
  const done = () => say("Copied.");
  if (navigator.clipboard) {
    navigator.clipboard.writeText(copied).then(done, (error) => say(`Not copied: ${error.message}`));
    return;
  }
  const before = document.activeElement;
  const area = make("textarea", copied);
  document.body.append(area);
  area.select();
  if (document.execCommand("copy")) done();
  area.remove();
  before.focus();
}

// --- search and filters -----------------------------------------------------------------------------------

function find(text) {
  const given = text.trim();
  if (!given) return;
  const page = (path, query) => { location.href = root + path + (query ? `?${new URLSearchParams(query)}` : ""); };
  if (/^(evt_)?[0-9a-f]{4,8}-?[0-9a-f-]*$/i.test(given)) page(`events/${encodeURIComponent(given)}`);
  else if (/[.*]/.test(given) && !/\s/.test(given)) page("events", { type: given });
  else page("events", { subject: given });
}

function filter(form) {
  const query = new URLSearchParams();
  for (const [name, value] of new FormData(form)) if (value.trim()) query.set(name, value.trim());
  location.href = `?${query}${form.dataset.filter}`;
}

document.addEventListener("submit", (event) => {
  event.preventDefault();
  const form = event.target;
  if (form.dataset.find !== undefined) find(new FormData(form).get("find"));
  else if (form.dataset.filter !== undefined) filter(form);
  else if (form.dataset.login !== undefined) begin({ token: new FormData(form).get("token") });
});

document.addEventListener("click", (event) => {
  const asked = event.target.closest("button[data-ask]");
  if (asked) ask(asked);
  const button = event.target.closest("button[data-call]");
  if (button) act(button);
  if (event.target.closest("[data-select]")) selectAll();
  if (event.target.closest("[data-keys]")) help();
  if (event.target.closest("[data-logout]")) login("DELETE").then(() => again(), (error) => say(error.message));
  const copied = event.target.closest("[data-copy], [data-copy-from]");
  if (copied && (copied.matches("button") || !String(getSelection()))) copy(copied);
});

// --- times ------------------------------------------------------------------------------------------------

const UNITS = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];

function duration(seconds) {
  let left = Math.floor(seconds);
  const parts = [];
  for (const [unit, length] of UNITS) {
    const count = Math.floor(left / length);
    left %= length;
    if (count || (unit === "s" && !parts.length)) parts.push(`${count} ${unit}`);
    else if (parts.length) break;
  }
  return parts.slice(0, 2).join(" ");
}

// Times in full are in UTC, or in the browser's time zone if the operator wants that.
const zone = document.querySelector("[data-zone]");

function full(time) {
  if (localStorage.getItem("zone") !== "local") return time.toISOString().replace("T", " ").replace("Z", " UTC");
  const ahead = -time.getTimezoneOffset();
  const local = new Date(time.getTime() + ahead * 60000).toISOString().replace("T", " ").slice(0, -1);
  const part = (minutes) => String(Math.floor(minutes)).padStart(2, "0");
  return `${local} ${ahead < 0 ? "-" : "+"}${part(Math.abs(ahead) / 60)}:${part(Math.abs(ahead) % 60)}`;
}

function times() {
  if (zone) zone.textContent = localStorage.getItem("zone") === "local" ? "Show times in UTC" : "Show local times";
  for (const element of document.querySelectorAll("time[datetime]")) {
    const text = full(new Date(element.dateTime));
    if (element.dataset.exact === undefined) element.title = text;
    else element.textContent = element.dataset.exact ? text.slice(11, 23) : text;
  }
}

zone?.addEventListener("click", () => {
  localStorage.setItem("zone", localStorage.getItem("zone") === "local" ? "UTC" : "local");
  times();
});

function age() {
  if (document.hidden) return;
  for (const element of document.querySelectorAll("time[datetime]:not([data-exact])")) {
    const passed = (Date.now() - Date.parse(element.dateTime)) / 1000;
    const text = passed <= -1 ? `in ${duration(-passed)}` : `${duration(Math.max(0, passed))} ago`;
    if (element.textContent !== text) element.textContent = text;
  }
}

// --- live figures -----------------------------------------------------------------------------------------

// A hidden page has no streams. Browsers open at most six connections to a host, for all pages together.
// So pages share the stream of figures, and at most three other streams are open at a time: the next one waits until a
// page closes or is hidden. Browsers have locks only on https and loopback.
const OTHERS = ["1", "2", "3"].map((number) => `hookferry stream ${number}`);
const REOPEN = 5000; // milliseconds
const OLD = 10000; // milliseconds without new figures after which the page says that they are old
let streams = [];

function show(element, value) {
  const text = value === undefined ? null : value.toLocaleString("en");
  if (text !== null && element.textContent !== text) element.textContent = text;
}

function follow() {
  for (const close of streams) close();
  streams = document.hidden ? [] : [figures(), newItems()].filter(Boolean);
}

// Opens a stream as soon as one of the locks is free; returns a function that closes it.
function subscribe(path, locks, handlers) {
  const ended = new AbortController();
  const use = () => new Promise((resolve) => {
    const stream = new EventSource(api + path);
    for (const [name, handle] of Object.entries(handlers)) stream.addEventListener(name, handle);
    stream.addEventListener("error", () => reopen(stream));
    ended.signal.addEventListener("abort", () => { stream.close(); resolve(); });
  });
  const waiting = new AbortController();
  const { signal } = waiting;
  let taken = false;
  const once = async () => {
    if (taken || ended.signal.aborted) return;
    taken = true;
    waiting.abort();
    await use();
  };
  if (!navigator.locks) use();
  else for (const name of locks) navigator.locks.request(name, { signal }, once).catch(() => {});
  return () => { waiting.abort(); ended.abort(); };
}

// A browser reconnects after a network error. Any other answer ends a stream: the login has expired, or a proxy
// says that the relay restarts.
let reopening = 0;

function reopen(stream) {
  if (stream.readyState !== EventSource.CLOSED || reopening) return;
  reopening = setTimeout(async () => {
    reopening = 0;
    const state = await login("GET").catch(() => ({ logged_in: true }));
    if (state.logged_in) follow();
    else again();
  }, REOPEN);
}

let drawn = 0; // time of the latest figures; 0: the page has none

function figures() {
  const pending = [...document.querySelectorAll("[data-live]")];
  const rates = [...document.querySelectorAll("[data-rate]")];
  drawn = 0;
  if (!pending.length && !rates.length) return null;
  drawn = Date.now();
  const address = new URL(`${api}top`, location).href;
  const channel = navigator.locks && new BroadcastChannel(address);
  const draw = ({ data }) => {
    const top = JSON.parse(data);
    const waiting = new Map(top.destinations.map((each) => [each.name, each.pending]));
    const speeds = new Map([
      ...top.sources.map((each) => [`sources ${each.name}`, each.events_per_second]),
      ...top.destinations.map((each) => [`destinations ${each.name}`, each.attempts_per_second]),
    ]);
    drawn = Date.now();
    changed(top);
    for (const element of pending) show(element, waiting.get(element.dataset.live));
    for (const element of rates) show(element, speeds.get(element.dataset.rate));
  };
  channel?.addEventListener("message", draw);
  const close = subscribe("top", [address], { top: (event) => { channel?.postMessage(event.data); draw(event); } });
  return () => { close(); channel?.close(); };
}

let silent = false;

function watchFigures() {
  const old = drawn > 0 && Date.now() - drawn > OLD;
  if (old !== silent) say(old ? "The relay does not answer, so the figures are old." : "");
  silent = old;
}

// --- problems ---------------------------------------------------------------------------------------------

// The page shows the problems at the time of its load. When they change, it reloads. A page in use shows a link instead,
// so that nobody presses a button that has just moved. A reload would also interrupt a navigation.
const LEAVING = 5000; // milliseconds that a navigation takes at most
const PROBLEMS = 60000; // milliseconds between two checks of the problems, also on a hidden page
const RELOAD = 3000; // minimum milliseconds between two reloads
const problems = document.querySelector("[data-changed]");
let known = "";
let left = -LEAVING;
let renewing = 0;

addEventListener("beforeunload", () => { left = performance.now(); });

function changed({ ready, reasons, workers, sources, destinations }) {
  const before = known;
  known = JSON.stringify([ready, reasons, workers.OFFLINE, sources.map((each) => [each.name, each.paused]),
    destinations.map((each) => [each.name, each.held])]);
  if (before && before !== known) renew();
}

function renew() {
  if (!problems || renewing) return;
  renewing = setTimeout(() => {
    renewing = 0;
    const busy = document.querySelector("main:hover, main :focus, dialog") || performance.now() - left < LEAVING;
    if (busy) problems.hidden = false;
    else location.reload();
  }, Math.max(0, RELOAD - performance.now()));
}

// A hidden or pinned tab shows new problems in its title and on its icon.
async function watchProblems() {
  if (!problems) return;
  const name = document.title.replace(/^\([^)]*\) /, "");
  const answer = await fetch(location.href, { redirect: "error" }).catch(() => null);
  if (!answer?.ok) {
    document.title = `(${answer ? "log in" : "no answer"}) ${name}`;
    return;
  }
  const page = await answer.text();
  const part = (pattern) => pattern.exec(page)?.[1] || "";
  document.title = part(/<title>(\([^)]*\) )?/) + name;
  document.querySelector("link[rel=icon]").href = part(/rel="icon" href="([^"]*)"/);
  if (part(/data-changed="([^"]*)"/) !== problems.dataset.changed && !document.hidden) renew();
}

// New items are counted and not inserted: rows that move are hard to read and easy to miss with the mouse.
// Each connection begins with the stored events since the page was made, so it counts from 0. The relay sends
// only the number of later events.
function newItems() {
  const place = document.querySelector("[data-tail]");
  if (!place || place.dataset.full) return null;
  const known = new Set(place.dataset.known.split(" "));
  let count = 0;
  let waiting = 0;
  const write = () => {
    waiting = 0;
    place.hidden = !count;
    place.firstElementChild.textContent = `${count.toLocaleString("en")}${place.dataset.full || ""} new: show`;
  };
  // Changing the page for each of many events would keep the browser busy.
  const add = (number) => {
    count += number;
    if (count >= Number(place.dataset.most)) {
      place.dataset.full = "+";
      close();
    }
    waiting ||= setTimeout(write, 200);
  };
  const close = subscribe(`tail?${place.dataset.tail}`, OTHERS, {
    open: () => { count = 0; },
    event: (event) => { if (!known.has(event.lastEventId)) add(1); },
    count: (event) => add(JSON.parse(event.data).events),
    lost: (event) => add(JSON.parse(event.data).count),
  });
  return close;
}

// --- progress ---------------------------------------------------------------------------------------------

async function progress() {
  const element = document.querySelector("[data-progress]");
  if (!element) return;
  while (!document.hidden) {
    const answer = await fetch(api + element.dataset.progress);
    if (!answer.ok) return;
    const { count, done, state } = await answer.json();
    element.querySelector("progress").value = done;
    element.querySelector("[data-progress-text]").textContent =
      `${done.toLocaleString("en")} of ${count.toLocaleString("en")}`;
    if (state !== "running" && state !== "cancelling") { location.reload(); return; }
    await new Promise((resolve) => { setTimeout(resolve, 1000); });
  }
}

// --- keys -------------------------------------------------------------------------------------------------

const GO = { n: "", e: "events", l: "deliveries", d: "destinations", r: "refused", s: "sources", w: "workers", a: "audit" };
let before = "";

function step(by) {
  const row = (link) => link.closest("tr, .ways > li");
  const links = [...document.querySelectorAll("tbody tr th a, tbody tr td a, .ways > li > a")]
    .filter((link, at, all) => all.findIndex((other) => row(other) === row(link)) === at);
  const now = links.findIndex((link) => row(link).contains(document.activeElement));
  const next = links[now + by] || links[now < 0 ? 0 : now];
  if (next) next.focus();
}

// The button asks for a confirmation, so a key alone changes nothing.
function press(...commands) {
  const found = [...document.querySelectorAll("button[data-call]")]
    .find((each) => !each.disabled && commands.some((command) => each.dataset.command.startsWith(command)));
  if (found) found.click();
}

const KEYS = [["/", "go to the search field"], ["j, k", "next and previous row; Enter opens it"],
  ["x", "select or deselect the row"], ["r", "press the first button to retry"], ["p", "press the first button to pause or resume"],
  ...Object.entries(GO).map(([letter, page]) => [`g ${letter}`, page || "now"])];

function help() {
  const dialog = make("dialog", "", { "aria-labelledby": "keys" });
  const list = make("dl");
  for (const [key, text] of KEYS) {
    const row = make("div");
    row.append(make("dt", key), make("dd", text));
    list.append(row);
  }
  const close = make("button", "Close", { type: "button" });
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  dialog.append(make("h2", "Keys", { id: "keys" }), list, close);
  document.body.append(dialog);
  dialog.showModal();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.target.matches("input:not([type=checkbox]), select, textarea")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const key = event.key;
  if (before === "g" && key in GO) location.href = root + GO[key];
  else if (key === "/") { event.preventDefault(); document.querySelector("[name=find]")?.focus(); }
  else if (key === "j") step(1);
  else if (key === "k") step(-1);
  else if (key === "x") document.activeElement.closest("tr")?.querySelector("input[name=id]")?.click();
  else if (key === "r") press("relay deliveries retry");
  else if (key === "p") press("relay destinations pause", "relay destinations resume");
  else if (key === "?") help();
  before = key;
});

document.addEventListener("visibilitychange", () => {
  follow();
  age();
  progress().catch(() => {});
  if (!document.hidden) watchProblems();
});
progress().catch(() => {});
afterReload();
selected();
times();
document.querySelector("[aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });
arrive();
follow();
setInterval(() => { age(); watchFigures(); }, 1000);
setInterval(watchProblems, PROBLEMS);
