"use strict";
const at = (id) => document.getElementById(id);
const most = 200; // rows of the table
const commands = {
  embed: "protea embed proteins.fasta -m MODEL -o vectors.parquet",
  residues: "protea embed proteins.fasta -m MODEL -r residues.h5",
  logits: "protea embed proteins.fasta -m MODEL --logits logits.h5",
  perplexity: "protea perplexity proteins.fasta -m MODEL -o perplexity.csv",
  contacts: "protea contacts proteins.fasta -m MODEL -o contacts.h5",
  score: "protea score protein.fasta -m MODEL -v VARIANTS -o scored.csv",
  scan: "protea score protein.fasta -m MODEL --scan -o scan.csv",
};

function quoted(text) { return "'" + text.replaceAll("'", "'\\''") + "'"; }

function headers() {
  const key = at("key").value;
  return Object.assign({ "Content-Type": "application/json" }, key ? { Authorization: "Bearer " + key } : {});
}

function records(text) {
  const found = [];
  for (const line of text.split(/\r?\n/).map((line) => line.trim()).filter(Boolean)) {
    if (line.startsWith(">")) found.push({ id: line.slice(1).trim().split(/\s+/)[0] || String(found.length), sequence: "" });
    else if (found.length) found[found.length - 1].sequence += line;
    else found.push({ id: "0", sequence: line });
  }
  return found;
}

function body(route, proteins) {
  const model = at("model").value;
  const base = model ? { model } : {};
  if (route !== "score" && route !== "scan") return { ...base, sequences: proteins };
  if (proteins.length !== 1) throw new Error(route + " takes one protein; there are " + proteins.length);
  const variants = at("variants").value.split(",").map((name) => name.trim()).filter(Boolean);
  return { ...base, sequence: proteins[0].sequence, ...(route === "score" ? { variants } : {}) };
}

function cell(value) {
  if (!Array.isArray(value)) return value === null ? "" : typeof value === "number" ? String(+value.toPrecision(6)) : String(value);
  const shape = [];
  for (let part = value; Array.isArray(part); part = part[0]) shape.push(part.length);
  const flat = value.flat(Infinity).slice(0, 4).map((number) => number === null ? "-" : number.toFixed(4));
  return "[" + shape.join(" × ") + "] " + flat.join(", ") + (value.flat(Infinity).length > 4 ? ", …" : "");
}

function row(values, kind) {
  const line = document.createElement("tr");
  for (const value of values) line.appendChild(document.createElement(kind)).textContent = value;
  return line;
}

function show(answer, route, sent) {
  const names = Object.keys(answer.records[0] || {});
  at("table").replaceChildren(row(names, "th"), ...answer.records.slice(0, most).map((r) => row(names.map((n) => cell(r[n])), "td")));
  const blob = new Blob([JSON.stringify(answer)], { type: "application/json" });
  URL.revokeObjectURL(at("download").href);
  at("download").href = URL.createObjectURL(blob);
  at("download").download = "protea-" + route + ".json";
  const key = at("key").value ? " -H \"Authorization: Bearer $PROTEA_KEY\"" : "";
  at("curl").textContent = "curl " + location.origin + "/v1/" + route + key + " -H 'Content-Type: application/json' -d " + quoted(JSON.stringify(sent));
  at("command").textContent = commands[route].replace("MODEL", answer.model).replace("VARIANTS", at("variants").value);
  const notes = (answer.notes || []).map((note) => note.id + ": " + note.what + ": " + note.detail).join("; ");
  const more = answer.records.length > most ? "; the table shows the first " + most : "";
  at("status").textContent = answer.records.length + " rows" + more + (notes ? ". " + notes : "");
  at("answer").hidden = false;
}

async function models() {
  const answer = await fetch("/v1/models", { headers: headers() });
  if (!answer.ok) return;
  const names = (await answer.json()).data.map((model) => model.id);
  at("model").replaceChildren(...names.map((name) => new Option(name, name)));
}

at("route").addEventListener("change", () => { at("variants-label").hidden = at("route").value !== "score"; });
at("key").addEventListener("change", models);
at("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  at("answer").hidden = true;
  at("status").className = "";
  at("status").textContent = "computing …";
  try {
    const route = at("route").value, sent = body(route, records(at("fasta").value));
    const answer = await fetch("/v1/" + route, { method: "POST", headers: headers(), body: JSON.stringify(sent) });
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.detail || answer.statusText);
    show(found, route, sent);
  } catch (error) {
    at("status").className = "error";
    at("status").textContent = error.message;
  }
});
models();
