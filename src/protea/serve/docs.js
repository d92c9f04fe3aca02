"use strict";
function add(parent, kind, text) {
  const made = parent.appendChild(document.createElement(kind));
  made.textContent = text;
  return made;
}

function resolved(schema, all, depth) {
  if (!schema || depth > 6) return "…";
  if (schema.$ref) return resolved(all[schema.$ref.split("/").pop()], all, depth + 1);
  if (schema.properties) {
    return Object.fromEntries(Object.entries(schema.properties).map(([name, part]) => [name, part]));
  }
  return schema;
}

function words(part, all) {
  const kind = part.enum ? part.enum.join(" | ") : part.type || (part.anyOf || []).map((one) => words(one, all)).join(" or ");
  if (part.$ref) return part.$ref.split("/").pop();
  return kind === "array" ? "list of " + words(part.items || {}, all) : kind || "any";
}

(async () => {
  const described = await (await fetch("/openapi.json")).json();
  const all = (described.components || {}).schemas || {};
  const root = document.getElementById("routes");
  let group = "";
  for (const [path, methods] of Object.entries(described.paths)) {
    for (const [method, route] of Object.entries(methods)) {
      const tag = (route.tags || ["other"])[0];
      if (tag !== group) add(root, "h2", (group = tag));
      const box = add(root, "details", "");
      add(box, "summary", method.toUpperCase() + " " + path + (route.summary ? " — " + route.summary : ""));
      for (const given of route.parameters || []) {
        add(box, "p", given.name + " (" + given.in + "): " + words(given.schema || {}, all));
      }
      const content = (route.requestBody || {}).content || {};
      for (const [type, media] of Object.entries(content)) {
        add(box, "p", "Body: " + type);
        const fields = resolved(media.schema, all, 0);
        const lines = Object.entries(fields).map(([name, part]) =>
          typeof part !== "object" ? "" : name + ": " + words(part, all) + ("default" in part ? " = " + JSON.stringify(part.default) : "")
            + (part.description ? "   " + part.description : "") + (part.examples ? "\n    example: " + JSON.stringify(part.examples[0]) : ""));
        add(box, "pre", lines.filter(Boolean).join("\n"));
      }
      const codes = Object.entries(route.responses || {}).map(([code, answer]) => code + " " + (answer.description || ""));
      add(box, "pre", codes.join("\n"));
    }
  }
})();
