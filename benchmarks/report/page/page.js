"use strict";
(() => {
  const stored = document.getElementById("frontier-data");
  if (!stored) return;
  const { sweep, pictures, teacher, examples } = JSON.parse(stored.textContent);
  const find = (id) => document.getElementById(id);
  const slider = find("threshold");
  const cards = [...document.querySelectorAll(".examples li")];
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  const count = (number) => number.toLocaleString("en-US");
  const write = (id, text) => { find(id).textContent = text; };

  // "low high first last" of an axis -> a function from values to places.
  const axis = (drawing, name) => {
    const [low, high, first, last] = find(drawing).dataset[name].split(" ").map(Number);
    return (value) => first + ((value - low) / (high - low)) * (last - first);
  };
  const curve = { x: axis("curve", "x"), y: axis("curve", "y") };
  const bottom = Number(find("curve").dataset.y.split(" ")[2]);
  const margin = axis("histogram", "x");

  const place = (element, values) => {
    for (const [name, value] of Object.entries(values)) find(element).setAttribute(name, value);
  };

  const draw = (threshold, gmacs, accuracy) => {
    const [x, y] = [curve.x(gmacs), curve.y(100 * accuracy)];
    place("point", { cx: x, cy: y });
    place("across", { x1: curve.x(0), x2: x, y1: y, y2: y });
    place("down", { x1: x, x2: x, y1: y, y2: bottom });
    const edge = margin(Math.min(threshold, 1));
    place("veil", { width: edge - margin(0) });
    place("edge", { x1: edge, x2: edge });
  };

  const label = (card, example, threshold) => {
    const refined = example.margin < threshold;
    const guess = example.guesses[refined ? 1 : 0];
    const right = guess === example.name;
    card.classList.toggle("refined", refined);
    card.querySelector(".stop").textContent = refined ? "goes on to the fine level" : "stops at the coarse level";
    const answer = card.querySelector(".answer");
    answer.textContent = right ? "✓ right" : `✗ ${guess}`;
    answer.className = `answer ${right ? "right" : "wrong"}`;
    return refined;
  };

  const update = () => {
    const step = Number(slider.value);
    const threshold = sweep.threshold[step];
    const refined = sweep.refined[step];
    const accuracy = sweep.right[step] / pictures;
    const gmacs = sweep.gmacs[step];
    const said = threshold > 1 ? "above 1, none stops" : threshold.toFixed(3);
    write("shown", said);
    write("stopped", percent(1 - refined / pictures));
    write("stopped-count", count(pictures - refined));
    write("refined", percent(refined / pictures));
    write("refined-count", count(refined));
    write("accuracy", percent(accuracy));
    write("gmacs", gmacs.toFixed(4));
    write("saved", percent(1 - gmacs / teacher.gmacs));
    slider.setAttribute(
      "aria-valuetext",
      `${said}: ${percent(refined / pictures)} go on, ${percent(accuracy)} right, ${gmacs.toFixed(4)} GMACs`,
    );
    draw(threshold, gmacs, accuracy);
    const going = cards.filter((card, number) => label(card, examples[number], threshold)).length;
    write("counted", `Of these ${cards.length}, the surest first, ${cards.length - going} stop and ${going} go on.`);
  };

  slider.addEventListener("input", update);
  update();
})();
