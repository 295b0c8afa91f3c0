// Show what an internal link of the text leads to, while it is hovered or focused.
// _ext/previews.py writes what there is to show.
"use strict";
(() => {
  const root = new URL(document.documentElement.dataset.content_root, location.href);
  const pages = new Map(); // page -> promise of its previews
  const waiting = new Map(); // page -> what to call when they are there
  const box = document.createElement("div");
  box.id = "preview";
  box.setAttribute("role", "tooltip");
  box.hidden = true;
  let link = null, timer = 0;

  window.previews = (page, found) => waiting.get(page)(found);

  function load(page) {
    if (!pages.has(page)) {
      pages.set(page, new Promise((resolve) => {
        waiting.set(page, resolve);
        const script = document.createElement("script");
        script.src = new URL(`previews/${page}.js`, root).href;
        script.onerror = () => resolve({});
        document.head.append(script);
      }));
    }
    return pages.get(page);
  }

  // the page and the place in it, or null where there is nothing to show
  function target(anchor) {
    const url = new URL(anchor.getAttribute("href"), location.href);
    const place = decodeURIComponent(url.hash.slice(1));
    url.hash = url.search = "";
    const page = url.href.startsWith(root.href) && url.href.slice(root.href.length);
    return page && place && page.endsWith(".html")
      ? { page: page.slice(0, -5), place, url } : null;
  }

  async function show(anchor) {
    const { page, place, url } = target(anchor);
    const markup = (await load(page))[place];
    if (!markup || link !== anchor) return;
    box.innerHTML = markup;
    for (const name of ["href", "src"]) {
      for (const element of box.querySelectorAll(`[${name}]`)) {
        element.setAttribute(name, new URL(element.getAttribute(name), url).href);
      }
    }
    anchor.removeAttribute("title"); // one hint is enough
    anchor.setAttribute("aria-describedby", "preview");
    box.hidden = false;
    await window.MathJax?.typesetPromise?.([box]);
    place_beside(anchor);
  }

  function place_beside(anchor) {
    const { left, top, bottom } = anchor.getBoundingClientRect();
    const room = document.documentElement;
    const x = Math.max(8, Math.min(left, room.clientWidth - box.offsetWidth - 8));
    const below = bottom + box.offsetHeight + 12 < room.clientHeight;
    const y = below || top < box.offsetHeight + 12 ? bottom + 4 : top - box.offsetHeight - 4;
    box.style.left = `${x}px`;
    box.style.top = `${y}px`;
  }

  function hide() {
    clearTimeout(timer);
    if (link) link.removeAttribute("aria-describedby");
    window.MathJax?.typesetClear?.([box]);
    link = null;
    box.hidden = true;
  }

  function soon(anchor, wait) {
    clearTimeout(timer);
    if (anchor === link) return;
    timer = setTimeout(() => {
      hide();
      link = anchor;
      show(anchor);
    }, wait);
  }

  function leave() {
    clearTimeout(timer);
    timer = setTimeout(hide, 200);
  }

  document.addEventListener("DOMContentLoaded", () => {
    document.body.append(box);
    box.addEventListener("pointerenter", () => clearTimeout(timer));
    box.addEventListener("pointerleave", leave);
    for (const anchor of document.querySelectorAll("article a[href*='#']:not(.headerlink)")) {
      if (!target(anchor)) continue;
      anchor.addEventListener("pointerenter", (event) => {
        if (event.pointerType === "mouse") soon(anchor, 250);
      });
      anchor.addEventListener("pointerleave", leave);
      anchor.addEventListener("focus", () => {
        if (anchor.matches(":focus-visible")) soon(anchor, 250);
      });
      anchor.addEventListener("blur", leave);
    }
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
  document.addEventListener("scroll", () => box.hidden || place_beside(link), { passive: true });
})();
