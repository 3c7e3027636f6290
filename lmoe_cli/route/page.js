
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const box = document.getElementById("text");
const panel = document.getElementById("panel");
const tokens = [...box.querySelectorAll("ruby")];
let pinned = -1;

function shares(gates) {
  const total = Math.max(1, gates.reduce((sum, gate) => sum + Math.abs(gate), 0));
  return gates.map((gate) => Math.abs(gate) / total);
}

function leader(of) {
  const rest = Math.max(1 - of.reduce((sum, share) => sum + share, 0), 1e-6);
  const best = of.indexOf(Math.max(...of));
  return best < 0 || of[best] < rest ? -1 : best;
}

function paint(layer) {
  tokens.forEach((token, number) => {
    const of = shares(layer < 0 ? data.tokens[number].gates : data.tokens[number].layers[layer]);
    const best = leader(of);
    const [least, most] = data.strength;
    const letter = best < 0 ? data.nobody : data.letters[best];
    token.style.background = best < 0 ? "" : `rgba(${data.colours[best]},${least + (most - least) * of[best]})`;
    token.querySelector("rt").textContent = best >= 0 && of[best] <= 0.5 ? letter.toLowerCase() : letter;
  });
}

function made(name, text, parent) {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

function row(table, label, gates) {
  const line = made("tr", undefined, table);
  made("th", label, line);
  gates.forEach((gate) => made("td", gate.toFixed(3), line));
  const bar = made("td", undefined, line);
  bar.className = "bar";
  shares(gates).forEach((share, number) => {
    const part = made("i", undefined, bar);
    part.style.width = `${share * 16}rem`;
    part.style.background = `rgb(${data.colours[number]})`;
  });
}

function show(number) {
  tokens.forEach((token, other) => token.classList.toggle("on", other === number));
  panel.replaceChildren();
  if (number < 0) return;
  const token = data.tokens[number];
  const head = made("div", undefined, panel);
  made("code", JSON.stringify(token.text), head);
  head.append(` token ${number}, id ${token.id}`);
  if (token.change !== undefined && token.change !== null) {
    const sign = token.change < 0 ? "" : "+";
    head.append(`; log p ${token.logprob.toFixed(3)}, without ${token.logprob_without.toFixed(3)}: `);
    made("b", sign + token.change.toFixed(3), head);
  }
  const table = made("table", undefined, panel);
  const heads = made("tr", undefined, table);
  made("th", "", heads);
  data.names.forEach((name, at) => made("th", `${data.letters[at]} ${name}`, heads));
  row(table, "mean", token.gates);
  token.layers.forEach((gates, at) => row(table, data.layers[at], gates));
}

function marked(event) {
  const token = event.target.closest("ruby");
  return token ? Number(token.dataset.n) : -1;
}

tokens.forEach((token, number) => {
  token.removeAttribute("title");
  const change = data.tokens[number].change;
  if (change >= 0.1) token.classList.add("likelier");
  if (change <= -0.1) token.classList.add("unlikelier");
});
box.addEventListener("mouseover", (event) => { if (marked(event) >= 0) show(marked(event)); });
box.addEventListener("mouseleave", () => show(pinned));
box.addEventListener("click", (event) => { pinned = marked(event) === pinned ? -1 : marked(event); show(pinned); });
box.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (event.key === "Escape") pinned = -1;
  else if (step) pinned = Math.min(Math.max(pinned + step, 0), tokens.length - 1);
  else return;
  event.preventDefault();
  show(pinned);
});
document.getElementById("layer").addEventListener("change", (event) => paint(Number(event.target.value)));
