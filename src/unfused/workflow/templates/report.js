"use strict";
(() => {
  const { points, media } = JSON.parse(document.getElementById("payload").textContent);
  const $ = (id) => document.getElementById(id);
  const each = (selector, act) => document.querySelectorAll(selector).forEach(act);
  const make = (tag, text, parent) => {
    const element = document.createElement(tag);
    if (text != null) element.textContent = text;
    if (parent) parent.append(element);
    return element;
  };
  const isSound = (index) => media[index].startsWith("data:audio/");

  // --- sound: one at a time, whatever started it ---
  const sound = new Audio();
  let playing = -1; // index into media
  let queue = []; // points still to be heard when a whole cluster is played
  const showPlaying = () => {
    each(".play[data-media]", (b) => b.classList.toggle("playing", Number(b.dataset.media) === playing));
    if ($("hear")) $("hear").textContent = queue.length ? "stop" : "play the whole cluster";
  };
  const stop = () => { sound.pause(); playing = -1; queue = []; showPlaying(); };
  const play = (index) => {
    playing = index;
    sound.src = media[index];
    sound.play().catch((error) => {
      if (error.name !== "AbortError") { say("This browser cannot play it."); stop(); }
    });
    showPlaying();
  };
  sound.addEventListener("ended", () => {
    playing = -1;
    const next = queue.shift();
    if (next === undefined) showPlaying();
    else { choose(next); play(points.media[next]); }
  });
  const say = (text) => { if ($("said")) $("said").textContent = text; };

  // Pictures stand for themselves in lists.
  const fillPictures = (root) => root.querySelectorAll(".play[data-media]").forEach((button) => {
    const index = Number(button.dataset.media);
    if (isSound(index) || button.firstChild) return;
    button.classList.add("picture");
    make("img", null, button).alt = "";
    button.firstChild.src = media[index];
  });
  fillPictures(document);

  let choose = () => {};
  document.addEventListener("click", (event) => {
    const button = event.target.closest(".play[data-media]");
    const row = event.target.closest("[data-row]");
    if (button) {
      const index = Number(button.dataset.media);
      const was = playing;
      stop();
      if (button.dataset.point) choose(Number(button.dataset.point));
      if (isSound(index) && was !== index) play(index);
    } else if (row) choose(Number(row.dataset.row));
  });

  if (points) {
    // --- the map ---
    const plot = $("plot"), tip = $("tip"), mark = $("mark"), form = document.querySelector(".controls");
    const circles = [...$("points").children];
    const count = circles.length;
    const everyone = [...Array(count).keys()];
    const others = new Map(); // cluster -> its points, from its middle outwards
    everyone.forEach((i) => {
      if (!others.has(points.cluster[i])) others.set(points.cluster[i], []);
      others.get(points.cluster[i]).push(i);
    });
    others.forEach((own) => {
      const middle = (axis) => own.reduce((sum, i) => sum + axis[i], 0) / own.length;
      const x = middle(points.x), y = middle(points.y);
      const away = (i) => (points.x[i] - x) ** 2 + (points.y[i] - y) ** 2;
      own.sort((a, b) => away(a) - away(b));
    });
    let current = -1;
    let shown = everyone.map(() => true);
    const passage = (i, tag, parent) => { // a text, or a row of a table: what is read instead of played
      if (!points.text || !points.text[i]) return false;
      const element = make(tag, points.text[i], parent);
      element.className = "text";
      element.dir = "auto";
      return true;
    };
    const nameOf = (index) => (index < 0 ? null : points.names[index]);
    const differs = (i) => points.label[i] >= 0 && points.predicted[i] >= 0 && points.label[i] !== points.predicted[i];

    const matches = {
      known: (i) => points.label[i] >= 0,
      unknown: (i) => points.label[i] < 0,
      wrong: differs,
    };
    const paint = () => {
      const mode = form.elements.mode.value || "cluster";
      const filter = form.elements.filter.value;
      const [key, value] = filter.split(":");
      shown = everyone.map(!filter ? () => true : matches[filter] || ((i) => points[key][i] === Number(value)));
      circles.forEach((circle, i) => {
        const colour = mode === "cluster" ? points.clusterColour[i] : points[mode][i] < 0 ? -1 : points.nameColour[points[mode][i]];
        circle.setAttribute("class", (colour < 0 ? "none" : "k" + colour) + (mode === "predicted" && differs(i) ? " differs" : points.rims && points.label[i] >= 0 ? " known" : "") + (shown[i] ? "" : " off"));
      });
      each(".captions", (group) => group.toggleAttribute("hidden", group.dataset.mode !== mode));
      each(".legend", (legend) => legend.toggleAttribute("hidden", mode === "cluster"));
      plot.classList.toggle("faded", Boolean(filter));
    };

    const nearest = (event) => {
      const box = plot.getBoundingClientRect();
      const scale = plot.viewBox.baseVal.width / box.width;
      const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
      let best = -1, least = (24 * scale) ** 2;
      for (let i = 0; i < count; i++) {
        const distance = (points.x[i] - x) ** 2 + (points.y[i] - y) ** 2;
        if (shown[i] && distance < least) { best = i; least = distance; }
      }
      return best;
    };
    const hint = (i) => {
      tip.hidden = i < 0;
      if (i < 0) return;
      tip.replaceChildren();
      make("bdi", points.name[i], tip);
      passage(i, "div", tip);
      const index = points.media[i];
      if (index >= 0 && !isSound(index)) make("img", null, tip).src = media[index];
      const words = [nameOf(points.label[i]), points.predicted[i] >= 0 && points.label[i] < 0 ? nameOf(points.predicted[i]) + "?" : null];
      const word = words.find(Boolean);
      if (word) make("div", word, tip).className = "soft";
      const box = plot.getBoundingClientRect(), scale = box.width / plot.viewBox.baseVal.width;
      const x = points.x[i] * scale, y = points.y[i] * scale;
      tip.style.left = Math.max(0, Math.min(x + 12, box.width - tip.offsetWidth)) + "px";
      tip.style.top = (y + 14 + tip.offsetHeight > box.height ? y - 12 - tip.offsetHeight : y + 14) + "px";
    };

    const fact = (name, value, style) => {
      if (value == null) return;
      make("dt", name, $("card-facts"));
      const cell = make("dd", null, $("card-facts"));
      make("bdi", value, cell);
      if (style) cell.className = style;
    };
    choose = (i) => {
      current = i;
      mark.removeAttribute("hidden");
      mark.setAttribute("cx", points.x[i]);
      mark.setAttribute("cy", points.y[i]);
      $("card").hidden = false;
      $("card-name").textContent = points.name[i];
      const holder = $("card-media");
      holder.replaceChildren();
      const index = points.media[i];
      if (index >= 0 && isSound(index)) {
        const line = make("p", null, holder);
        const button = make("button", null, line);
        button.type = "button";
        button.className = "play";
        button.dataset.media = index;
        button.setAttribute("aria-label", "Play " + points.name[i]);
      } else if (index >= 0) {
        const picture = make("img", null, holder);
        picture.alt = points.name[i];
        picture.src = media[index];
      } else if (!passage(i, "p", holder)) make("p", "no preview in this page", holder).className = "soft";
      $("card-facts").replaceChildren();
      fact("label", nameOf(points.label[i]));
      fact("predicted", nameOf(points.predicted[i]), differs(i) ? "differs" : "");
      const own = others.get(points.cluster[i]);
      if (points.cluster[i] >= 0) fact("cluster", points.clusterNames[points.cluster[i]]);
      $("card-place").textContent = own.indexOf(i) + 1 + " of " + own.length;
      const sounds = own.some((k) => points.media[k] >= 0 && isSound(points.media[k]));
      $("hear").parentElement.hidden = !sounds || points.cluster[i] < 0;
      each("[data-row]", (row) => row.classList.toggle("chosen", Number(row.dataset.row) === i));
      say([points.name[i], nameOf(points.label[i]), nameOf(points.predicted[i]) && "predicted " + nameOf(points.predicted[i])].filter(Boolean).join(", "));
      showPlaying();
    };
    const start = (i) => {
      stop();
      choose(i);
      if (points.media[i] >= 0 && isSound(points.media[i])) play(points.media[i]);
    };
    const step = (by) => {
      if (current < 0) return;
      const own = others.get(points.cluster[current]);
      start(own[(own.indexOf(current) + by + own.length) % own.length]);
    };
    // The nearest point in the direction of the arrow; what lies aside counts double.
    const towards = (dx, dy) => {
      if (current < 0) return shown.indexOf(true);
      let best = current, least = Infinity;
      for (let i = 0; i < count; i++) {
        const x = points.x[i] - points.x[current], y = points.y[i] - points.y[current];
        const along = x * dx + y * dy, aside = Math.abs(x * dy) + Math.abs(y * dx);
        if (i === current || !shown[i] || along <= 0 || aside > along) continue;
        if (along + 2 * aside < least) { best = i; least = along + 2 * aside; }
      }
      return best;
    };

    plot.addEventListener("pointermove", (event) => { if (event.pointerType === "mouse") hint(nearest(event)); });
    plot.addEventListener("pointerleave", () => hint(-1));
    plot.addEventListener("click", (event) => {
      const i = nearest(event);
      if (i >= 0) start(i);
    });
    plot.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (arrow) {
        const i = towards(...arrow);
        if (i >= 0) { choose(i); hint(i); }
      } else if ((event.key === "Enter" || event.key === " ") && current >= 0) start(current);
      else if (event.key === "n") step(1);
      else if (event.key === "p") step(-1);
      else if (event.key === "Escape") { stop(); hint(-1); }
      else return;
      event.preventDefault();
    });
    plot.addEventListener("blur", () => hint(-1));
    $("previous").addEventListener("click", () => step(-1));
    $("next").addEventListener("click", () => step(1));
    $("hear").addEventListener("click", () => {
      if (queue.length) { stop(); return; }
      const own = others.get(points.cluster[current]).filter((i) => points.media[i] >= 0 && isSound(points.media[i]));
      stop();
      queue = own.slice(1);
      choose(own[0]);
      play(points.media[own[0]]);
    });
    each("[data-cluster]", (button) => button.addEventListener("click", () => {
      form.elements.filter.value = "cluster:" + button.dataset.cluster;
      paint();
      choose(others.get(Number(button.dataset.cluster))[0]);
      $("map").scrollIntoView({ block: "start" });
    }));
    form.addEventListener("change", paint);
    form.addEventListener("submit", (event) => event.preventDefault());
    paint();
  }

  window.addEventListener("beforeprint", () => each("details", (details) => { details.open = true; }));
  document.documentElement.dataset.ready = "yes";
})();
