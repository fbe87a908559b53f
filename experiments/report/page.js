"use strict";
// The charts. data: {runs: [name], charts: {title: [{run: index, points: [[step, mean, low, high]]}]}}
const data = JSON.parse(document.getElementById("data").textContent);
const boxes = new Map([...document.querySelectorAll("[data-run]")].map(box => [Number(box.dataset.run), box]));
const smooth = document.getElementById("smooth"), drawn = [];
const text = name => name.replaceAll("&", "&amp;").replaceAll("<", "&lt;"); // Plotly reads tags in names
const column = (points, i) => points.map(point => point[i]);

// A running mean with weight w on the past, corrected for its start.
function smoothed(values, w) {
  let sum = 0, weight = 0;
  return values.map(value => {
    sum = w * sum + (1 - w) * value;
    weight = w * weight + 1 - w;
    return sum / weight;
  });
}

function traces({ run, points }) {
  const { colour: color, dash } = boxes.get(run).dataset, w = smooth.valueAsNumber;
  const x = column(points, 0), y = column(points, 1), behind = { x, hoverinfo: "skip", mode: "lines", line: { color, width: 0 } };
  const line = { x, y: smoothed(y, w), name: text(data.runs[run]), hovertemplate: "%{y}",
    mode: points.length > 1 ? "lines" : "markers", line: { color, dash }, marker: { color } };
  if (w) return [{ ...behind, y, opacity: 0.35, line: { color, width: 1 } }, line];
  if (points[0].length < 3) return [line];
  const edge = { ...behind, y: column(points, 2) };
  return [edge, { ...behind, y: column(points, 3), fill: "tonexty", fillcolor: color + "30" }, line];
}

const LAYOUT = {
  margin: { l: 54, r: 12, t: 8, b: 24 }, showlegend: false, hovermode: "x unified", hoverlabel: { namelength: -1 },
  font: { size: 11, family: "system-ui, sans-serif" }, paper_bgcolor: "#0000", plot_bgcolor: "#0000",
  dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // a finger scrolls
  xaxis: { tickformat: ",", unifiedhovertitle: { text: "step %{x}" } },
};

function chart(figure) {
  const plot = figure.querySelector(".plot"), [log, slider] = figure.querySelectorAll("input");
  let lines, steps, size = {};
  const draw = () => {
    lines = data.charts[figure.dataset.key].filter(line => boxes.get(line.run).checked);
    steps = [...new Set(lines.flatMap(line => column(line.points, 0)))].sort((a, b) => a - b);
    slider.max = Math.max(steps.length - 1, 0);
    slider.value = slider.max;
    const yaxis = { type: log.checked ? "log" : "linear", hoverformat: ".4~g", zeroline: false };
    size = { width: plot.clientWidth, height: plot.clientHeight };
    Plotly.react(plot, lines.flatMap(traces), { ...LAYOUT, ...size, yaxis }, { displayModeBar: false });
  };
  const hide = () => Plotly.Fx.unhover(plot);
  const point = () => {
    const step = steps[slider.value], last = line => line.points.findLast(p => p[0] <= step);
    const said = lines.filter(last).map(line => `${data.runs[line.run]} ${Number(last(line)[1].toPrecision(4))}`);
    slider.setAttribute("aria-valuetext", `step ${step?.toLocaleString("en")}: ${said.join(", ") || "no run shown"}`);
    Plotly.Fx.hover(plot, { xval: step }, "xy");
  };
  const fit = () => { if (plot.clientWidth && plot.clientWidth !== size.width) draw(); }; // not while it is folded away
  fit();
  new ResizeObserver(fit).observe(plot);
  drawn.push(() => { size = {}; fit(); });
  log.onchange = draw;
  slider.oninput = slider.onfocus = point;
  slider.onblur = hide;
  slider.onkeydown = event => { if (event.key === "Escape") hide(); };
}

if (smooth) {
  document.getElementById("controls").hidden = false;
  document.querySelectorAll(".chart").forEach(chart);
  document.getElementById("controls").oninput = () => {
    smooth.nextElementSibling.value = smooth.value;
    drawn.forEach(draw => draw());
  };
}
