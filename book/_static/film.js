// Films: a play button and a slider. All frames but the first are images that wait
// (loading="lazy", hidden) until somebody touches either.
(() => {
  const calm = matchMedia("(prefers-reduced-motion: reduce)");

  function start(film) {
    const frames = [...film.querySelectorAll("figure")];
    const images = frames.map(frame => frame.querySelector("img"));
    const [button, slider, label, status] =
      ["button", "input", "output", "[role=status]"].map(s => film.querySelector(s));
    const last = frames.length - 1;
    let playing = null; // the run that is on, if any
    let wanted = 0;

    // Under reduced motion nothing runs by itself: the button shows one frame more.
    const name = () => {
      button.textContent = playing ? "❚❚ Pause" : calm.matches ? "▶ Next" : "▶ Play";
    };

    async function show(i) {
      wanted = i;
      images.forEach(image => { image.loading = "eager"; });
      slider.value = i;
      label.textContent = frames[i].querySelector("figcaption").textContent;
      slider.setAttribute("aria-valuetext", label.textContent);
      await images[i].decode().catch(() => {}); // the old frame stays until then
      if (wanted === i) frames.forEach((frame, j) => { frame.hidden = j !== i; });
    }

    const say = () => { status.textContent = images[wanted].alt; };

    function stop() {
      playing = null;
      name();
      say();
    }

    async function play() {
      const run = playing = {};
      name();
      await show(wanted === last ? 0 : wanted);
      while (playing === run && wanted < last) {
        await new Promise(done => setTimeout(done, Number(film.dataset.pause)));
        if (playing === run) await show(wanted + 1);
      }
      if (playing === run) stop();
    }

    button.addEventListener("click", () => {
      if (playing) stop();
      else if (calm.matches) show(wanted === last ? 0 : wanted + 1).then(say);
      else play();
    });
    slider.addEventListener("input", () => {
      playing = null;
      name();
      show(Number(slider.value));
    });
    slider.addEventListener("change", say);
    calm.addEventListener("change", () => {
      if (calm.matches) playing = null;
      name();
    });

    slider.value = 0; // browsers keep it over a reload
    slider.setAttribute("aria-valuetext", label.textContent);
    name();
    film.querySelector("p").hidden = false;
  }

  document.querySelectorAll(".film").forEach(start);
})();
