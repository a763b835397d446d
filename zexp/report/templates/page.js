"use strict";
// Sorting, the two charts and the theme. Everything else on the page stands without a script.
(function () {
  const root = document.documentElement;
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : window.matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  // A link to a stage opens the list that it stands in.
  function showStage() {
    if (location.hash.startsWith("#stage-")) {
      document.getElementById("all-stages").open = true;
      const row = document.getElementById(decodeURIComponent(location.hash.slice(1)));
      if (row) row.scrollIntoView({ block: "center" });
    }
  }
  window.addEventListener("hashchange", showStage);
  showStage();

  // ---- the leaderboard: a heading sorts; best first, again for worst first; rows without a score stay last
  const board = document.getElementById("board");
  const headings = Array.from(board.querySelectorAll("thead th"));
  headings.forEach((heading, column) => {
    heading.addEventListener("click", () => {
      const best = heading.dataset.better === "high" ? "descending" : "ascending";
      const worst = best === "ascending" ? "descending" : "ascending";
      const order = heading.getAttribute("aria-sort") === best ? worst : best;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const numeric = heading.dataset.sort === "number";
      const value = (row) => row.cells[column].dataset.value;
      const rows = Array.from(board.tBodies[0].rows).sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        return sign * (numeric ? Number(x) - Number(y) : x.localeCompare(y));
      });
      board.tBodies[0].append(...rows);
    });
  });

  // ---- the curves
  const data = JSON.parse(document.getElementById("data").textContent);
  const lossBox = document.getElementById("loss");
  if (!lossBox) return;
  const COLOURS = ["#3b82c4", "#e07b39", "#2e9e6b", "#c65b9c", "#b59a1c", "#4fb3bf", "#8a6fd1", "#a0522d"];
  const DASHES = [null, "6 3", "2 3", "9 3 2 3", "12 4"];
  const SHARED = "shared";
  const colourBy = document.getElementById("colour");
  const choices = data.axes.length ? data.axes : ["variant"];
  for (const axis of choices) colourBy.append(new Option(axis, axis));
  const hidden = new Set();

  const valueOf = (series, axis) => (axis === "variant" ? series.variants : series.axes[axis]);
  const groupOf = (series) => {
    const value = valueOf(series, colourBy.value);
    return value === null || value === "None" ? SHARED : value;
  };
  const otherOf = (series) =>
    data.axes.filter((axis) => axis !== colourBy.value && axis !== "seed").map((axis) => series.axes[axis])
      .filter((value) => value !== null && value !== "None").join(", ");

  let groups, others;
  function scales() {
    groups = Array.from(new Set(data.series.map(groupOf))).filter((g) => g !== SHARED);
    others = Array.from(new Set(data.series.map(otherOf))).filter((o) => o !== "");
  }
  const colour = (series) => {
    const i = groups.indexOf(groupOf(series));
    return i < 0 ? "var(--quiet)" : COLOURS[i % COLOURS.length];
  };
  const dash = (series) => {
    const i = others.indexOf(otherOf(series));
    return i < 0 ? null : DASHES[i % DASHES.length];
  };

  function legend() {
    const box = d3.select("#legend").html("");
    const shared = data.series.some((series) => groupOf(series) === SHARED) ? [SHARED] : [];
    for (const group of groups.concat(shared)) {
      const button = box.append("button").attr("type", "button").classed("off", hidden.has(group));
      button.append("span").text("● ").style("color", group === SHARED ? "var(--quiet)" : COLOURS[groups.indexOf(group) % COLOURS.length]);
      button.append("span").text(group === SHARED ? "several (shared)" : group);
      button.on("click", () => {
        if (!hidden.delete(group)) hidden.add(group);
        draw();
      });
    }
    if (others.length > 1) {
      others.forEach((other, i) => {
        const key = box.append("span");
        key.append("svg").attr("width", 30).attr("height", 10).append("line")
          .attr("x1", 1).attr("x2", 29).attr("y1", 5).attr("y2", 5)
          .style("stroke", "var(--ink)").attr("stroke-dasharray", DASHES[i % DASHES.length]);
        key.append("span").text(" " + other);
      });
    }
  }

  // Exponential mean that starts unbiased (its weights are normalised), goes on from the parent's at the fork, so that
  // a chain is one line, and breaks where the loss is not finite. Returns id -> points.
  function chained(alpha) {
    const done = {}; // series come parents first
    for (const series of data.series) {
      let sum = 0, weight = 0;
      const points = [];
      const before = (done[series.parent] || []).filter((point) => point[0] <= series.start && point[1] !== null).pop();
      if (before) { points.push(before); [sum, weight] = before[2]; }
      for (const [tokens, value] of series.loss) {
        if (value === null) { sum = 0; weight = 0; points.push([tokens, null]); continue; }
        sum = alpha * sum + (1 - alpha) * value;
        weight = alpha * weight + (1 - alpha);
        points.push([tokens, sum / weight, [sum, weight]]);
      }
      done[series.id] = series.loss.length ? points : [];
    }
    return done;
  }

  const tokensText = (n) => {
    for (const [unit, size] of [["T", 1e12], ["B", 1e9], ["M", 1e6], ["K", 1e3]])
      if (Math.abs(n) >= size) return d3.format(".4~g")(n / size) + " " + unit;
    return String(n);
  };

  let zoomX = null;
  const charts = [
    { box: lossBox, key: "loss", height: 380, zoomY: null, zero: false, format: d3.format(".4f") },
    { box: document.getElementById("lr"), key: "lr", height: 210, zoomY: null, zero: true, format: d3.format(".4~g") },
  ];

  function drawChart(chart) {
    const { box, key } = chart;
    const alpha = Number(document.getElementById("smooth").value);
    const losses = key === "loss" ? chained(alpha) : null;
    const shown = data.series.filter((series) => series[key].length && !hidden.has(groupOf(series)))
      .map((series) => ({ series, points: losses ? losses[series.id] : series[key] }));
    const margin = { top: 8, right: 16, bottom: 26, left: 62 };
    const width = box.clientWidth, height = chart.height;
    const host = d3.select(box);
    host.html("");
    const svg = host.append("svg").attr("width", width).attr("height", height).attr("role", "img").attr("aria-label", key);
    const tip = host.append("div").attr("class", "tip");
    const all = [].concat(...shown.map((one) => one.points)).filter((point) => point[1] !== null);
    if (!all.length) return;
    const x = d3.scaleLinear().domain(zoomX || [0, d3.max(data.series, (s) => d3.max(s.lr.concat(s.loss), (p) => p[0]))])
      .range([margin.left, width - margin.right]);
    const inside = all.filter((point) => point[0] >= x.domain()[0] && point[0] <= x.domain()[1]);
    const extent = d3.extent(inside.length ? inside : all, (point) => point[1]);
    const log = key === "loss" && document.getElementById("log").checked && extent[0] > 0;
    const y = (log ? d3.scaleLog() : d3.scaleLinear())
      .domain(chart.zoomY || [chart.zero ? 0 : extent[0], extent[1]]).range([height - margin.bottom, margin.top]);
    if (!chart.zoomY) y.nice();
    svg.append("g").attr("class", "axis").attr("transform", `translate(0,${height - margin.bottom})`)
      .call(d3.axisBottom(x).ticks(8).tickFormat(tokensText).tickSizeOuter(0));
    svg.append("g").attr("class", "axis").attr("transform", `translate(${margin.left},0)`)
      .call(d3.axisLeft(y).ticks(6, log ? "~g" : undefined).tickSize(-(width - margin.left - margin.right)).tickSizeOuter(0))
      .call((g) => g.select(".domain").remove());
    const clip = "clip-" + key;
    svg.append("clipPath").attr("id", clip).append("rect").attr("x", margin.left).attr("y", 0)
      .attr("width", width - margin.left - margin.right).attr("height", height - margin.bottom);
    const line = d3.line().defined((p) => p[1] !== null && (!log || p[1] > 0)).x((p) => x(p[0])).y((p) => y(p[1]));
    const paths = svg.append("g").attr("clip-path", `url(#${clip})`).selectAll("path").data(shown).enter().append("path")
      .attr("class", "series").attr("d", (one) => line(one.points))
      .style("stroke", (one) => colour(one.series)).attr("stroke-dasharray", (one) => dash(one.series));

    const brush = d3.brush().extent([[margin.left, margin.top], [width - margin.right, height - margin.bottom]])
      .on("end", () => {
        const area = d3.event.selection;
        if (!area) return;
        zoomX = [x.invert(area[0][0]), x.invert(area[1][0])];
        if (area[1][1] - area[0][1] > 12) chart.zoomY = [y.invert(area[1][1]), y.invert(area[0][1])];
        draw();
      });
    svg.append("g").attr("class", "brush").call(brush)
      .on("dblclick", reset)
      .on("mousemove", function () {
        const [mx, my] = d3.mouse(this);
        let best = null;
        for (const one of shown) {
          const i = d3.bisector((p) => p[0]).left(one.points, x.invert(mx));
          for (const point of [one.points[i - 1], one.points[i]]) {
            if (!point || point[1] === null) continue;
            const distance = Math.hypot(x(point[0]) - mx, y(point[1]) - my);
            if (distance < 60 && (!best || distance < best.distance)) best = { distance, point, one };
          }
        }
        paths.classed("dim", (one) => best !== null && one !== best.one);
        if (!best) { tip.style("display", "none"); return; }
        const series = best.one.series;
        tip.html("").style("display", "block");
        tip.append("b").text(series.variants);
        tip.append("div").text(`${series.label} · ${series.id}`);
        tip.append("div").text(`${d3.format(",")(best.point[0])} tokens: ${chart.format(best.point[1])}`);
        const left = mx + 16 + tip.node().offsetWidth > width ? mx - 16 - tip.node().offsetWidth : mx + 16;
        tip.style("left", left + "px").style("top", Math.max(0, my - 20) + "px");
      })
      .on("mouseleave", () => { tip.style("display", "none"); paths.classed("dim", false); });
  }

  function reset() {
    zoomX = null;
    for (const chart of charts) chart.zoomY = null;
    draw();
  }
  function draw() {
    scales();
    legend();
    charts.forEach(drawChart);
  }
  colourBy.addEventListener("change", () => { hidden.clear(); draw(); });
  for (const id of ["log", "smooth"]) document.getElementById(id).addEventListener("input", draw);
  document.getElementById("reset").addEventListener("click", reset);
  let waiting = null;
  window.addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(draw, 120); });
  draw();
})();
