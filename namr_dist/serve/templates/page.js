"use strict";

const element = id => document.getElementById(id);
let picture = null; // what was searched for last
let asked = 0; // searches so far: of several at a time the last one is shown

async function search(file) {
  if (!file) return;
  picture = file;
  const mine = ++asked;
  showQuery(file);
  element("error").hidden = true;
  element("status").textContent = "Searching…";
  element("neighbours").setAttribute("aria-busy", "true");
  try {
    const answer = await ask(file, element("k").value);
    if (mine === asked) showNeighbours(answer.neighbours);
  } catch (error) {
    if (mine === asked) showError(error.message);
  } finally {
    if (mine === asked) element("neighbours").setAttribute("aria-busy", "false");
  }
}

async function ask(file, k) {
  let response;
  try {
    // A file of unknown type is sent all the same: the service looks at its bytes, and says what is wrong with them.
    const type = file.type.startsWith("image/") ? file.type : "image/unknown";
    response = await fetch(`search?k=${k}`, { method: "POST", body: file, headers: { "Content-Type": type } });
  } catch {
    throw new Error("The service does not answer; look whether it still runs.");
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(sentence(answer.detail || `the service answered ${response.status}`));
  return answer;
}

const sentence = text => `${text[0].toUpperCase()}${text.slice(1)}.`;

function showQuery(file) {
  const query = element("query");
  URL.revokeObjectURL(query.src);
  query.src = URL.createObjectURL(file);
  query.hidden = false;
}

function showNeighbours(neighbours) {
  element("found").hidden = false;
  const count = neighbours.length;
  element("status").textContent = `${count} picture${count === 1 ? "" : "s"}, the nearest first`;
  element("neighbours").replaceChildren(...neighbours.map(item));
}

function item(neighbour) {
  const image = document.createElement("img");
  image.src = neighbour.thumbnail;
  image.alt = neighbour.label ?? neighbour.id;
  image.loading = "lazy";
  const parts = [image];
  if (neighbour.label !== null) parts.push(text("b", neighbour.label));
  parts.push(text("span", neighbour.id), text("span", `distance ${neighbour.distance.toFixed(4)}`));
  const entry = document.createElement("li");
  entry.append(...parts);
  return entry;
}

function text(kind, content) {
  const made = document.createElement(kind);
  made.textContent = content;
  return made;
}

function showError(message) {
  element("status").textContent = "";
  element("found").hidden = true;
  element("neighbours").replaceChildren();
  element("error").textContent = message;
  element("error").hidden = false;
}

const firstFile = transfer => transfer?.files[0] ?? null;

let depth = 0; // elements within each other that something is dragged over
addEventListener("dragenter", event => { event.preventDefault(); depth++; document.body.classList.add("dragging"); });
addEventListener("dragleave", () => { if (--depth <= 0) stopDragging(); });
addEventListener("dragover", event => event.preventDefault());
addEventListener("drop", event => {
  event.preventDefault();
  stopDragging();
  const file = firstFile(event.dataTransfer);
  if (file) search(file);
  else showError("What was dropped is no file; save the picture first, or paste it.");
});
function stopDragging() { depth = 0; document.body.classList.remove("dragging"); }

addEventListener("paste", event => {
  const file = firstFile(event.clipboardData);
  if (file) search(file);
  else showError("There is no picture on the clipboard; copy the picture itself, not its address.");
});
element("file").addEventListener("change", event => {
  search(event.target.files[0]);
  event.target.value = ""; // the same file may be chosen again
});
element("k").addEventListener("change", () => search(picture));
element("form").addEventListener("submit", event => event.preventDefault());
element("query").addEventListener("error", event => { event.target.hidden = true; });
element("curl").textContent =
  `curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' '${new URL("search?k=6", location.href)}'`;
