// Beside the copy button of a code cell, one that copies the cells it needs as well.
document.addEventListener("DOMContentLoaded", () => {
  const list = document.getElementById("cell-needs");
  if (!list) return;
  const code = (name) =>
    document.querySelector(`#${name} .cell_input pre`)?.textContent.trimEnd();

  for (const [name, needed] of Object.entries(JSON.parse(list.textContent))) {
    const block = document.querySelector(`#${name} .cell_input .highlight`);
    const parts = [...needed, name].map(code);
    if (!block || parts.includes(undefined)) continue;
    const count = needed.length;
    const others = count === 1 ? "the setup cell" : `the ${count} cells it needs`;
    const label = `+${count}: copy with ${others}`;
    const button = document.createElement("button");
    button.className = "copy-needs";
    button.type = "button";
    button.textContent = `+${count}`;
    const say = (text) => {
      button.title = text;
      button.setAttribute("aria-label", text);
    };
    say(label);
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(parts.join("\n\n\n") + "\n");
      say("Copied");
      button.classList.add("success");
      setTimeout(() => {
        say(label);
        button.classList.remove("success");
      }, 2000);
    });
    block.append(button);
  }
});
