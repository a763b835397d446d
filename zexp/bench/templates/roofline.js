"use strict";
// The roofline: both axes in powers of ten, a mark a pass, the machine's ceilings; a legend that hides blocks.
(function () {
  const root = document.documentElement;
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  const data = JSON.parse(document.getElementById("data").textContent);
  const box = document.getElementById("roof");
  const hidden = new Set();
  const PRECISIONS = ["fp32", "bf16"];
  const rate = (value) => d3.format(".3~s")(value).replace("G", " G").replace("T", " T").replace("M", " M") + "FLOP/s";

  function legend() {
    const host = d3.select("#legend").html("");
    for (const block of Object.keys(data.colours)) {
      const button = host.append("button").attr("type", "button").classed("off", hidden.has(block));
      button.append("span").text("● ").style("color", data.colours[block]);
      button.append("span").text(block);
      button.on("click", () => { if (!hidden.delete(block)) hidden.add(block); draw(); });
    }
  }

  function draw() {
    legend();
    const shown = data.points.filter((point) => !hidden.has(point.block));
    const bends = PRECISIONS.map((one) => data.ceilings["matmul_" + one] / data.ceilings.memory);
    const margin = { top: 14, right: 20, bottom: 40, left: 92 };
    const width = Math.max(480, box.clientWidth), height = 520;
    const xs = data.points.map((point) => point.intensity).concat(bends);
    const x = d3.scaleLog().domain([d3.min(xs) / 2, d3.max(xs) * 2]).range([margin.left, width - margin.right]);
    const top = d3.max(PRECISIONS, (one) => data.ceilings["matmul_" + one]);
    const y = d3.scaleLog().domain([d3.min(data.points, (point) => point.flops_per_second) / 2, 2 * top])
      .range([height - margin.bottom, margin.top]).nice();
    const host = d3.select(box).html("");
    const svg = host.append("svg").attr("width", width).attr("height", height).attr("role", "img").attr("aria-label", "roofline");
    const tip = host.append("div").attr("class", "tip");
    svg.append("g").attr("class", "axis").attr("transform", `translate(0,${height - margin.bottom})`).call(d3.axisBottom(x).ticks(8, "~g"));
    svg.append("g").attr("class", "axis").attr("transform", `translate(${margin.left},0)`).call(d3.axisLeft(y).tickValues(y.ticks().filter((at) => "125".includes(at.toExponential()[0]))).tickFormat(rate));
    svg.append("text").attr("x", width - margin.right).attr("y", height - 6).attr("text-anchor", "end").text("FLOPs a byte");
    svg.append("clipPath").attr("id", "inside").append("rect").attr("x", margin.left).attr("y", margin.top)
      .attr("width", width - margin.left - margin.right).attr("height", height - margin.top - margin.bottom);
    for (const precision of PRECISIONS) {
      const matmul = data.ceilings["matmul_" + precision], bend = matmul / data.ceilings.memory;
      const [low, high] = x.domain();
      const corners = [low, Math.min(Math.max(bend, low), high), high].map((at) => [x(at), y(Math.min(matmul, at * data.ceilings.memory))]);
      svg.append("path").attr("class", "roof " + precision).attr("clip-path", "url(#inside)").attr("d", d3.line()(corners));
      svg.append("text").attr("x", width - margin.right - 4).attr("y", y(matmul) - 5).attr("text-anchor", "end").attr("font-size", 11)
        .text(`${precision}: ${rate(matmul)}`);
    }
    const symbol = (point) => d3.symbol().size(64).type(point.pass === "forward" ? d3.symbolCircle : d3.symbolSquare)();
    const marks = svg.append("g").selectAll("path").data(shown).enter().append("path").attr("class", "mark-point")
      .attr("transform", (point) => `translate(${x(point.intensity)},${y(point.flops_per_second)})`).attr("d", symbol)
      .style("stroke", (point) => data.colours[point.block]).style("stroke-width", 1.6)
      .style("fill", (point) => (point.dtype === "bf16" ? data.colours[point.block] : "var(--paper)"));
    marks.on("mouseenter", (point) => {
      marks.classed("dim", (other) => other.block !== point.block);
      tip.html("").style("display", "block");
      tip.append("b").text(`${point.block}, ${point.pass}`);
      tip.append("div").text(point.text);
      tip.append("div").text(`${d3.format(".3~g")(1e3 * point.seconds)} ms, ${rate(point.flops_per_second)}, ${d3.format(".3~g")(point.intensity)} FLOPs a byte`);
      tip.append("div").text(`${d3.format(".0%")(point.share)} of what the roof allows there`);
      const left = x(point.intensity) + 16, wide = tip.node().offsetWidth;
      tip.style("left", (left + wide > width ? left - 32 - wide : left) + "px").style("top", Math.max(0, y(point.flops_per_second) - 30) + "px");
    }).on("mouseleave", () => { tip.style("display", "none"); marks.classed("dim", false); });
  }

  let waiting = null;
  window.addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(draw, 120); });
  draw();
})();
