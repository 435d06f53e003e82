'use strict';
(() => {
  const data = JSON.parse(document.getElementById('data').textContent);
  const $ = (id) => document.getElementById(id);
  const runs = data.runs;

  // infinity travels as a string, JSON has none
  const number = (value) => (value === 'inf' ? Infinity : value);
  for (const run of runs) {
    for (const key of Object.keys(run)) run[key] = number(run[key]);
    for (const name of Object.keys(run.values)) run.values[name] = run.values[name].map(number);
  }

  const METRICS = [
    { key: 'psnr_mean', name: 'PSNR, mean (dB)', digits: 1 },
    { key: 'psnr_p5', name: 'PSNR, 5th percentile (dB)', digits: 1 },
    { key: 'psnr_min', name: 'PSNR, worst sample (dB)', digits: 1 },
    { key: 'ssim_mean', name: 'SSIM, mean', digits: 3 },
    { key: 'ssim_p5', name: 'SSIM, 5th percentile', digits: 3 },
    { key: 'latent_error', name: 'latent error, relative L2', digits: 4, lower: true },
    { key: 'lpips_mean', name: 'LPIPS, mean', digits: 4, lower: true },
    { key: 'fid', name: 'FID', digits: 2, lower: true },
    { key: 'kid', name: 'KID', digits: 4, lower: true },
    { key: 'class_accuracy', name: 'class accuracy', digits: 3 },
    ...data.metrics.map((metric) => ({ ...metric, digits: metric.key.startsWith('psnr') ? 1 : 4 })),
    { key: 'speed_ratio', name: 'speed, × the uncached run (wall time)', digits: 2, random: true },
  ];
  const COSTS = [
    { key: 'nfe_ratio', name: 'NFE, share of the uncached run', percent: true, lower: true },
    { key: 'flops_ratio', name: 'FLOPs, share of the uncached run', percent: true, lower: true },
    { key: 'blocks_ratio', name: 'executed blocks, share of the uncached run', percent: true, lower: true },
    { key: 'speed_ratio', name: 'speed, × the uncached run (wall time)' },
    { key: 'cpu_ratio', name: 'speed, × the uncached run (CPU time)' },
  ];
  const SAMPLE_METRICS = { psnr: 'PSNR (dB)', ssim: 'SSIM', lpips: 'LPIPS' };
  const KINDS = [
    { key: 'ours', name: 'This package', symbol: 'circle' },
    { key: 'rival', name: 'Rivals', symbol: 'diamond' },
    { key: 'baseline', name: 'Baselines', symbol: 'square' },
  ];
  // warm: this package; cool: rivals; grey: baselines. All are readable on light and on dark.
  const PALETTES = {
    ours: ['#e4572e', '#d6339a', '#e09f1f', '#a259e6', '#c9184a', '#b5722a', '#ff7d9c', '#8f7a00'],
    rival: ['#2388e8', '#159f86', '#5b6ee1', '#3fae3f', '#12a5c4', '#7a8ec9', '#6b9e1f', '#3f7d8c'],
    baseline: ['#8f949c', '#a5804f', '#748c5c', '#92719a', '#5f8297'],
  };
  const DASHES = ['solid', 'dash', 'dot', 'dashdot'];

  // appearance and visibility of each method, the same in every plot
  const methods = new Map();
  const methodKey = (run) => `${run.kind} ${run.method}`;
  for (const kind of KINDS) {
    const names = [...new Set(runs.filter((run) => run.kind === kind.key).map((run) => run.method))].sort();
    const palette = PALETTES[kind.key];
    names.forEach((name, i) => {
      methods.set(`${kind.key} ${name}`, {
        name,
        kind,
        color: palette[i % palette.length],
        dash: DASHES[(kind.key === 'baseline' ? i : Math.floor(i / palette.length)) % DASHES.length],
        visible: true,
      });
    });
  }
  const style = (run) => methods.get(methodKey(run));

  const state = { subject: 0, run: -1, sort: null, all: false };

  // text

  /** Text as plotly shows it: it reads a few tags, so none may be left in untrusted text. */
  const plain = (text) => String(text).replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;');
  const cut = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);
  const fixed = (value, digits) => {
    if (value === null || value === undefined) return '–';
    return value === Infinity ? '∞' : value.toFixed(digits);
  };
  const percent = (value) => (value === null || value === undefined ? '–' : `${(100 * value).toFixed(0)}%`);
  const times = (value) => (value === null || value === undefined ? '–' : `${value.toFixed(2)}×`);
  const speed = (run) => {
    if (run.speed_ratio === null || run.speed_low === null || run.speed_high === null) return times(run.speed_ratio);
    return `${times(run.speed_ratio)} (${run.speed_low.toFixed(2)}–${run.speed_high.toFixed(2)})`;
  };
  const title = (run) => [run.method, run.text].filter(Boolean).join(', ');
  const hover = (run, more = []) =>
    [
      `<b>${plain(cut(run.method, 60))}</b>`,
      plain(cut(run.text, 90)),
      ...more,
      `NFE ${percent(run.nfe_ratio)}, FLOPs ${percent(run.flops_ratio)}, speed ${speed(run)}`,
      run.psnr_mean === null ? '' : `PSNR ${['mean', 'p5', 'min'].map((k) => fixed(run[`psnr_${k}`], 1)).join(' / ')} dB`,
      plain(cut(run.note, 90)),
    ]
      .filter(Boolean)
      .join('<br>');

  const element = (tag, text, attributes = {}) => {
    const made = document.createElement(tag);
    if (text !== null && text !== undefined) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const options = (select, pairs, chosen) => {
    select.replaceChildren(...pairs.map(([value, text]) => element('option', text, { value })));
    if (pairs.some(([value]) => String(value) === String(chosen))) select.value = chosen;
  };

  // plots

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const CONFIG = {
    responsive: true,
    displaylogo: false,
    modeBarButtonsToRemove: ['select2d', 'lasso2d', 'autoScale2d'],
  };
  const axis = (extra) => ({
    gridcolor: color('grid'),
    linecolor: color('line'),
    zeroline: false,
    automargin: true,
    ...extra,
  });
  const layout = (extra) => ({
    paper_bgcolor: 'rgba(0,0,0,0)',
    plot_bgcolor: 'rgba(0,0,0,0)',
    font: { family: 'system-ui, sans-serif', size: 13, color: color('text') },
    margin: { l: 60, r: 20, t: 20, b: 50 },
    hovermode: 'closest',
    hoverlabel: { align: 'left', bgcolor: color('card'), bordercolor: color('line'), font: { color: color('text') } },
    showlegend: false,
    modebar: { bgcolor: 'rgba(0,0,0,0)', color: color('faint'), activecolor: color('text') },
    ...extra,
  });

  /** The element gets the plot's height too: plotly's own containers do not give it one. */
  const draw = (id, traces, shape) => {
    $(id).style.height = `${shape.height}px`;
    Plotly.react(id, traces, shape, CONFIG);
    if ($(id).dataset.wired) return;
    $(id).dataset.wired = 'yes';
    $(id).on('plotly_click', (event) => {
      const place = event.points[0].customdata;
      if (typeof place === 'number') choose(place);
    });
  };
  const erase = (id) => {
    Plotly.purge(id);
    delete $(id).dataset.wired;
    $(id).style.height = '0';
  };

  /** A place beyond the finite values at which infinite ones are drawn, and what marks it. */
  const beyond = (values, direction) => {
    const finite = values.filter((value) => Number.isFinite(value));
    const high = finite.length ? Math.max(...finite) : 1;
    const low = finite.length ? Math.min(...finite) : 0;
    const place = high + 0.1 * (high - low || 1);
    if (!values.includes(Infinity)) return { at: (value) => value, shapes: [], annotations: [] };
    const y = direction === 'y';
    const line = { type: 'line', line: { color: color('line'), dash: 'dot', width: 1 } };
    const shape = y ? { xref: 'paper', x0: 0, x1: 1, y0: place, y1: place } : { yref: 'paper', y0: 0, y1: 1, x0: place, x1: place };
    const anchor = y
      ? { xref: 'paper', x: 0, y: place, xanchor: 'left', yanchor: 'bottom' }
      : { yref: 'paper', y: 1, x: place, xanchor: 'center', yanchor: 'bottom' };
    const note = { text: '∞: a sample equal to the uncached', showarrow: false, font: { size: 11, color: color('faint') } };
    return {
      at: (value) => (value === Infinity ? place : value),
      shapes: [{ ...line, ...shape }],
      annotations: [{ ...note, ...anchor }],
    };
  };

  /** The points that no other beats in both coordinates, in the order of x. */
  const frontOf = (points, cost, metric) => {
    const better = (a, b, lower) => (lower ? a < b : a > b);
    const order = [...points].sort((a, b) => {
      if (a.x !== b.x) return better(a.x, b.x, cost.lower) ? -1 : 1;
      return better(a.y, b.y, metric.lower) ? -1 : 1;
    });
    const front = [];
    for (const point of order) {
      if (!front.length || better(point.y, front.at(-1).y, metric.lower)) front.push(point);
    }
    return front.sort((a, b) => a.x - b.x);
  };

  const shown = () => runs.map((run, i) => ({ run, i })).filter(({ run }) => run.subject === state.subject && style(run).visible);

  const drawFront = () => {
    const metric = METRICS.find((m) => m.key === $('metric').value);
    const cost = COSTS.find((c) => c.key === $('cost').value);
    if (!metric || !cost) {
      erase('front');
      $('front-note').textContent = data.subjects[state.subject].random
        ? 'Random weights: speed only, and no run of this model was timed.'
        : 'No run of this model has a quality to plot.';
      return;
    }
    const points = shown()
      .filter(({ run }) => run.correct && run[metric.key] !== null && run[cost.key] !== null)
      .map(({ run, i }) => ({ run, i, x: run[cost.key], y: run[metric.key] }));
    const edge = beyond(points.map((p) => p.y), 'y');
    const finite = points.filter((p) => Number.isFinite(p.y));
    const line = frontOf(finite, cost, metric);
    const traces = [
      {
        name: 'best of all', x: line.map((p) => p.x), y: line.map((p) => p.y), mode: 'lines', hoverinfo: 'skip',
        line: { color: color('front'), width: 12 }, meta: 'overall',
      },
    ];
    for (const [key, method] of methods) {
      const own = points.filter((p) => methodKey(p.run) === key);
      if (!own.length) continue;
      const best = frontOf(own.filter((p) => Number.isFinite(p.y)), cost, metric);
      const onFront = new Set(best.map((p) => p.i));
      const kept = $('front-only').checked ? own.filter((p) => onFront.has(p.i)) : own;
      traces.push({
        name: plain(method.name), x: best.map((p) => p.x), y: best.map((p) => p.y), mode: 'lines', hoverinfo: 'skip',
        line: { color: method.color, width: 2, dash: method.dash }, meta: 'line',
      });
      const trace = {
        name: plain(method.name),
        x: kept.map((p) => p.x),
        y: kept.map((p) => edge.at(p.y)),
        mode: 'markers',
        meta: 'points',
        marker: {
          color: method.color,
          symbol: method.kind.symbol,
          size: kept.map((p) => (onFront.has(p.i) || p.y === Infinity ? 10 : 7)),
          opacity: kept.map((p) => (onFront.has(p.i) || p.y === Infinity ? 1 : 0.45)),
          line: { width: kept.map((p) => (p.i === state.run ? 3 : 0.8)), color: kept.map((p) => color(p.i === state.run ? 'text' : 'card')) },
        },
        customdata: kept.map((p) => p.i),
        hovertext: kept.map((p) => hover(p.run, [`<b>${plain(metric.name)}: ${fixed(p.y, metric.digits)}</b>`])),
        hovertemplate: '%{hovertext}<extra></extra>',
      };
      if (cost.key === 'speed_ratio') {
        trace.error_x = {
          type: 'data', symmetric: false, thickness: 1, width: 2, color: method.color,
          array: kept.map((p) => (p.run.speed_high === null ? 0 : p.run.speed_high - p.x)),
          arrayminus: kept.map((p) => (p.run.speed_low === null ? 0 : p.x - p.run.speed_low)),
        };
      }
      traces.push(trace);
    }
    const budgets = cost.percent ? Object.entries(data.budgets) : [];
    draw('front', traces, layout({
      height: 520,
      margin: { l: 60, r: 20, t: 30, b: 50 },
      xaxis: axis({ title: { text: cost.name }, tickformat: cost.percent ? '.0%' : undefined }),
      yaxis: axis({ title: { text: metric.name }, type: metric.key === 'latent_error' && finite.every((p) => p.y > 0) && finite.length ? 'log' : 'linear' }),
      shapes: [
        ...edge.shapes,
        ...budgets.map(([, x]) => ({ type: 'line', x0: x, x1: x, yref: 'paper', y0: 0, y1: 1, layer: 'below', line: { color: color('line'), width: 1 } })),
      ],
      annotations: [
        ...edge.annotations,
        ...budgets.map(([text, x]) => ({ text, x, yref: 'paper', y: 1, yanchor: 'bottom', showarrow: false, font: { size: 11, color: color('faint') } })),
      ],
    }));
    const corner = `${metric.lower ? 'lower' : 'upper'} ${cost.lower ? 'left' : 'right'}`;
    $('front-note').textContent =
      (data.subjects[state.subject].random ? 'Random weights: speed only. ' : '')
      + `${points.length} runs; the best are ${corner}. A line joins a method's best settings, the broad one the best of all shown. `
      + (cost.key === 'speed_ratio' ? 'Bars: smallest to largest of the timed pairs. ' : '')
      + 'Click a point for that run.';
  };

  const drawHeat = () => {
    const run = runs[state.run];
    const map = run && run.heatmap;
    $('heat').hidden = !map;
    if (!map) {
      erase('heat');
      $('heat-note').textContent = run ? 'Which blocks were computed was not recorded for this run.' : '';
      return;
    }
    const z = map.rows.map((_, block) => map.steps.map((kind) => map.kinds[kind][block]));
    const known = z.flat().filter((share) => share !== null);
    const few = map.rows.length <= 40;
    const text = z.map((row, block) => row.map((share, step) =>
      `${plain(map.rows[block])}<br>step ${step + 1}: ${share === null ? 'not known' : `${share}% computed`}`));
    draw('heat', [{
      type: 'heatmap',
      z,
      x: map.steps.map((_, step) => step + 1),
      y: map.rows.map((_, block) => block),
      text,
      hovertemplate: '%{text}<extra></extra>',
      zmin: 0,
      zmax: 100,
      xgap: map.steps.length <= 120 ? 1 : 0,
      ygap: few ? 1 : 0,
      colorscale: [[0, color('reused')], [1, color('computed')]],
      colorbar: { thickness: 10, tickvals: [0, 50, 100], ticktext: ['reused', '50%', 'computed'], outlinewidth: 0 },
    }], layout({
      height: Math.max(200, 90 + (few ? 20 : 9) * map.rows.length),
      margin: { l: 60, r: 10, t: 10, b: 45 },
      xaxis: axis({ title: { text: 'step' }, showgrid: false }),
      yaxis: axis({
        autorange: 'reversed', showgrid: false,
        ...(few ? { tickvals: map.rows.map((_, i) => i), ticktext: map.rows.map((row) => plain(cut(row, 36))) } : { title: { text: 'block' } }),
        tickfont: { size: 11 },
      }),
    }));
    const mean = known.reduce((sum, share) => sum + share, 0) / (known.length || 1);
    $('heat-note').textContent = `Share of each block's work that was executed at each step, averaged over samples; ${mean.toFixed(0)}% over all.`;
  };

  // one run

  const drawRun = () => {
    const run = runs[state.run];
    $('run').value = state.run;
    const facts = run
      ? [
        ['kind', run.kind], ['scope', run.scope], ['settings', run.settings === '{}' ? '' : run.settings],
        ['steps', run.steps], ['samples', run.n || ''], ['NFE', percent(run.nfe_ratio)], ['FLOPs', percent(run.flops_ratio)],
        ['blocks', percent(run.blocks_ratio)], ['speed (wall)', speed(run)], ['speed (CPU)', times(run.cpu_ratio)],
        ['PSNR mean / p5 / worst', run.psnr_mean === null ? '' : ['mean', 'p5', 'min'].map((k) => fixed(run[`psnr_${k}`], 1)).join(' / ')],
        ['worst seed', run.psnr_worst_seed], ['SSIM', run.ssim_mean === null ? '' : fixed(run.ssim_mean, 3)], ['note', run.note],
        ['folder', run.run],
      ]
      : [];
    $('facts').replaceChildren(...facts.filter(([, value]) => value !== '' && value !== null && value !== '–').map(([name, value]) => {
      const box = element('div');
      box.append(element('dt', name), element('dd', value));
      return box;
    }));
    drawHeat();
    drawPictures(run);
  };

  const source = (index) => `data:image/png;base64,${data.images[index]}`;
  const difference = (triplet) => (triplet.identical ? 'difference: none' : `|difference| × ${triplet.gain}`);
  const figures = (triplet) => ['uncached', 'cached', difference(triplet)].map((name, i) => {
    const box = element('span', null, { class: 'picture' });
    box.append(element('img', null, { src: source(triplet.sources[i]), alt: `${triplet.place} sample, ${name}` }), element('span', name));
    return box;
  });

  const drawPictures = (run) => {
    if (!run) {
      $('pictures').replaceChildren();
      return;
    }
    if (!Array.isArray(run.pictures)) {
      const why = run.pictures
        ? 'The pictures of this run are left out to keep the page small.'
        : 'No pictures: they are kept for correct runs with trained weights, and shown for baselines and settings on their method\'s front.';
      $('pictures').replaceChildren(element('p', why, { class: 'faint' }));
      return;
    }
    $('pictures').replaceChildren(...run.pictures.map((triplet) => {
      const video = triplet.total > 1;
      const { prompts, seeds } = data.samples[run.samples];
      const k = triplet.sample;
      const what = `${triplet.place} sample`
        + (k === null ? '' : `: ${run.values.psnr ? `${fixed(run.values.psnr[k], 1)} dB, ` : ''}seed ${seeds[k]}, ${cut(prompts[k], 80)}`);
      const frames = video ? ` (frames ${triplet.frames.map((frame) => frame + 1).join(', ')} of ${triplet.total})` : '';
      const figure = element('figure', null, { class: video ? 'triplet video' : 'triplet' });
      const button = element('button', null, { type: 'button', 'aria-label': `Enlarge the ${triplet.place} sample` });
      button.append(...figures(triplet));
      button.addEventListener('click', () => {
        $('large-title').textContent = `${title(run)}, ${what}${frames}`;
        $('large-body').className = video ? 'video' : '';
        $('large-body').replaceChildren(...figures(triplet));
        $('large').showModal();
      });
      figure.append(element('figcaption', what + frames), button);
      return figure;
    }));
  };

  const choose = (place) => {
    state.run = place;
    if (place >= 0 && runs[place].subject !== state.subject) {
      state.subject = runs[place].subject;
      drawSubject();
      return;
    }
    drawRun();
    drawFront();
  };

  // samples

  const MOST_PROMPTS = 40;

  const drawStrip = () => {
    const name = $('sample-metric').value;
    const budget = $('budget').value;
    const picks = data.subjects[state.subject].picks[budget] || [];
    const chosen = picks.map((i) => ({ run: runs[i], i })).filter(({ run }) => style(run).visible && run.values[name]);
    $('strip').hidden = !chosen.length;
    if (!chosen.length) {
      erase('strip');
      $('strip-note').textContent = data.subjects[state.subject].random
        ? 'Random weights: speed only, there are no samples to compare.'
        : 'No method shown has samples within this budget.';
      return;
    }
    const points = [];
    chosen.forEach(({ run, i }, row) => {
      const { prompts, seeds } = data.samples[run.samples];
      run.values[name].forEach((value, k) => {
        if (value !== null) points.push({ run, i, row, value, k, prompt: prompts[k], seed: seeds[k] });
      });
    });
    const lower = name === 'lpips';
    const edge = beyond(points.map((p) => p.value), 'x');
    const byPrompt = $('by').value === 'prompt';
    let labels;
    let note = '';
    if (byPrompt) {
      const groups = new Map();
      for (const p of points) groups.set(p.prompt, [...(groups.get(p.prompt) || []), p.value]);
      const middle = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];
      const sign = lower ? -1 : 1;
      const hardest = [...groups].map(([prompt, values]) => [prompt, sign * middle(values)]).sort((a, b) => (a[1] === b[1] ? 0 : a[1] - b[1]));
      const order = new Map(hardest.slice(0, MOST_PROMPTS).map(([prompt], i) => [prompt, i]));
      for (const p of points) p.row = order.has(p.prompt) ? order.get(p.prompt) : null;
      labels = [...order.keys()];
      note = `Prompts in the order of their median, the hardest first${groups.size > MOST_PROMPTS ? `; the hardest ${MOST_PROMPTS} of ${groups.size}` : ''}.`;
    } else {
      labels = chosen.map(({ run }) => run.method);
      note = `Each method's best setting within the budget of ${budget} of the evaluations; ${data.budget_note}. Long bar: mean; short bar: p5, which 95% reach.`;
    }
    const traces = chosen.map(({ run, i }, place) => {
      const own = points.filter((p) => p.i === i && p.row !== null);
      const method = style(run);
      return {
        name: plain(run.method),
        x: own.map((p) => edge.at(p.value)),
        // spread by sample number, so that a sample keeps its height in every row
        y: own.map((p) => p.row + (byPrompt ? 0.6 * ((place + 0.5) / chosen.length - 0.5) : 0.5 * (((p.k * 0.618034) % 1) - 0.5))),
        mode: 'markers',
        meta: 'points',
        marker: { color: method.color, symbol: method.kind.symbol, size: 7, opacity: 0.75 },
        customdata: own.map((p) => p.i),
        hovertext: own.map((p) => `<b>${plain(cut(run.method, 60))}</b><br>${plain(cut(run.text, 90))}<br>${plain(cut(p.prompt, 90))}<br>seed ${p.seed}: ${fixed(p.value, name === 'psnr' ? 1 : 4)}`),
        hovertemplate: '%{hovertext}<extra></extra>',
      };
    });
    const bars = [];
    if (!byPrompt) {
      chosen.forEach(({ run }, row) => {
        for (const [key, height] of [[`${name}_mean`, 0.4], [`${name}_p5`, 0.22]]) {
          const x = run[key];
          if (Number.isFinite(x)) bars.push({ type: 'line', x0: x, x1: x, y0: row - height, y1: row + height, line: { color: color('text'), width: 2 } });
        }
      });
    }
    draw('strip', traces, layout({
      height: 120 + (byPrompt ? 34 : 42) * labels.length,
      margin: { l: 60, r: 30, t: 30, b: 50 },
      xaxis: axis({ title: { text: SAMPLE_METRICS[name] } }),
      yaxis: axis({
        tickvals: labels.map((_, i) => i), ticktext: labels.map((label) => plain(cut(label, 32))),
        range: [labels.length - 0.4, -0.6], showgrid: byPrompt,
      }),
      shapes: [...edge.shapes, ...bars],
      annotations: edge.annotations,
    }));
    $('strip-note').textContent = note;
  };

  // table

  const COLUMNS = [
    { key: 'model', name: 'model', text: true },
    { key: 'sampler', name: 'sampler', text: true },
    { key: 'kind', name: 'kind', text: true },
    { key: 'method', name: 'method', text: true },
    { key: 'scope', name: 'scope', text: true },
    { key: 'brief', name: 'settings', text: true, class: 'settings' },
    { key: 'nfe_ratio', name: 'NFE', show: percent },
    { key: 'flops_ratio', name: 'FLOPs', show: percent },
    { key: 'speed_ratio', name: 'speed', cell: speed },
    { key: 'cpu_ratio', name: 'CPU', show: times },
    { key: 'psnr_mean', name: 'PSNR', show: (v) => fixed(v, 1) },
    { key: 'psnr_p5', name: 'p5', show: (v) => fixed(v, 1) },
    { key: 'psnr_min', name: 'worst', show: (v) => fixed(v, 1) },
    { key: 'ssim_mean', name: 'SSIM', show: (v) => fixed(v, 3) },
    { key: 'latent_error', name: 'latent', show: (v) => fixed(v, 4) },
    { key: 'lpips_mean', name: 'LPIPS', show: (v) => fixed(v, 4) },
    { key: 'fid', name: 'FID', show: (v) => fixed(v, 2) },
    { key: 'kid', name: 'KID', show: (v) => fixed(v, 4) },
    { key: 'class_accuracy', name: 'accuracy', show: (v) => fixed(v, 3) },
    { key: 'n', name: 'n', show: String },
    { key: 'note', name: 'note', text: true, class: 'note' },
  ].filter((column) => runs.some((run) => run[column.key] !== null && run[column.key] !== '' && run[column.key] !== undefined));
  const FIRST_ROWS = 200;
  const searched = runs.map((run) =>
    [run.model, run.sampler, run.kind, run.method, run.scope, run.text, run.settings, run.note, run.run].join(' ').toLowerCase());

  const drawTable = () => {
    const words = $('filter').value.toLowerCase().split(/\s+/).filter(Boolean);
    const one = $('table-subject').value === 'one';
    let places = runs.map((_, i) => i).filter((i) =>
      style(runs[i]).visible
      && (!one || runs[i].subject === state.subject)
      && (!$('table-front').checked || runs[i].pareto)
      && words.every((word) => searched[i].includes(word)));
    if (state.sort) {
      const { key, sign } = state.sort;
      const compare = (a, b) => (typeof a === 'string' ? a.localeCompare(b) : a === b ? 0 : a - b);
      const missing = (i) => runs[i][key] === null || runs[i][key] === '';
      places = places.sort((i, j) =>
        (missing(i) || missing(j) ? missing(i) - missing(j) : sign * compare(runs[i][key], runs[j][key])) || i - j);
    }
    const visible = state.all ? places : places.slice(0, FIRST_ROWS);
    const body = document.createDocumentFragment();
    for (const i of visible) {
      const run = runs[i];
      const row = element('tr', null, { 'data-run': i });
      for (const column of COLUMNS) {
        const value = column.cell ? column.cell(run) : column.show ? column.show(run[column.key]) : run[column.key];
        const cell = element('td', null, { class: [column.text ? 'text' : '', column.class || ''].join(' ').trim() });
        if (column.key === 'method') {
          const open = element('button', value, { type: 'button', class: 'open', title: 'Show this run' });
          open.addEventListener('click', () => {
            choose(i);
            $('detail').scrollIntoView();
          });
          cell.append(open);
        } else {
          cell.textContent = value;
        }
        row.append(cell);
      }
      body.append(row);
    }
    $('runs').tBodies[0].replaceChildren(body);
    $('count').textContent = `${places.length} of ${runs.length} runs${visible.length < places.length ? `, the first ${visible.length} shown` : ''}`;
    $('more').hidden = visible.length === places.length;
    for (const head of $('runs').tHead.rows[0].cells) {
      const sorted = state.sort && head.dataset.key === state.sort.key;
      if (sorted) head.setAttribute('aria-sort', state.sort.sign > 0 ? 'ascending' : 'descending');
      else head.removeAttribute('aria-sort');
    }
  };

  const makeTable = () => {
    $('runs').tHead.rows[0].replaceChildren(...COLUMNS.map((column) => {
      const head = element('th', null, { scope: 'col', 'data-key': column.key, class: column.text ? 'text' : '' });
      const button = element('button', column.name, { type: 'button' });
      button.addEventListener('click', () => {
        const again = state.sort && state.sort.key === column.key;
        state.sort = { key: column.key, sign: again ? -state.sort.sign : 1 };
        drawTable();
      });
      head.append(button);
      return head;
    }));
  };

  // methods

  const SVG = 'http://www.w3.org/2000/svg';
  const swatch = (method) => {
    const svg = document.createElementNS(SVG, 'svg');
    const set = (node, values) => Object.entries(values).forEach(([key, value]) => node.setAttribute(key, value));
    set(svg, { width: 26, height: 14, viewBox: '0 0 26 14', 'aria-hidden': 'true' });
    const line = document.createElementNS(SVG, 'line');
    const dash = { solid: '', dash: '5 3', dot: '2 2', dashdot: '5 2 2 2' }[method.dash];
    set(line, { x1: 0, x2: 26, y1: 7, y2: 7, stroke: method.color, 'stroke-width': 2, 'stroke-dasharray': dash });
    const shapes = { circle: 'M13 2a5 5 0 1 0 0 10a5 5 0 1 0 0-10z', diamond: 'M13 1l6 6-6 6-6-6z', square: 'M8.5 2.5h9v9h-9z' };
    const mark = document.createElementNS(SVG, 'path');
    set(mark, { d: shapes[method.kind.symbol], fill: method.color });
    svg.append(line, mark);
    return svg;
  };

  const drawMethods = () => {
    const present = new Set(runs.filter((run) => run.subject === state.subject).map(methodKey));
    const boxes = [];
    for (const kind of KINDS) {
      const own = [...methods].filter(([key, method]) => method.kind === kind && present.has(key));
      if (own.length) boxes.push(element('h3', kind.name));
      for (const [key, method] of own) {
        const button = element('button', null, { type: 'button', class: 'method', 'aria-pressed': method.visible, 'data-method': key });
        button.append(swatch(method), element('span', method.name));
        button.addEventListener('click', () => {
          method.visible = !method.visible;
          button.setAttribute('aria-pressed', method.visible);
          drawFiltered();
        });
        boxes.push(button);
      }
    }
    $('methods').replaceChildren(...boxes);
  };

  const setAll = (visible) => {
    for (const method of methods.values()) method.visible = visible;
    drawMethods();
    drawFiltered();
  };

  const drawFiltered = () => {
    drawFront();
    drawStrip();
    drawTable();
  };

  const drawSubject = () => {
    const subject = data.subjects[state.subject];
    const own = runs.map((run, i) => ({ run, i })).filter(({ run }) => run.subject === state.subject);
    const has = (key) => own.some(({ run }) => run[key] !== null && run[key] !== undefined);
    $('subject').value = state.subject;
    options($('metric'), METRICS.filter((m) => has(m.key) && Boolean(m.random) === subject.random).map((m) => [m.key, m.name]), $('metric').value);
    options($('cost'), COSTS.filter((c) => has(c.key) && (c.percent || !subject.random)).map((c) => [c.key, c.name]), $('cost').value);
    const measured = Object.entries(SAMPLE_METRICS).filter(([name]) => own.some(({ run }) => run.values[name]));
    options($('sample-metric'), measured, $('sample-metric').value);
    options($('run'), own.map(({ run, i }) => [i, `${title(run)} · NFE ${percent(run.nfe_ratio)}${run.psnr_mean === null ? '' : ` · ${fixed(run.psnr_mean, 1)} dB`}${run.correct ? '' : ' · incorrect'}`]), state.run);
    if (state.run < 0 || runs[state.run].subject !== state.subject) {
      const picks = subject.picks['1/3'] || [];
      const first = picks.find((i) => runs[i].kind === 'ours' && runs[i].correct);
      state.run = first !== undefined ? first : own[0].i;
    }
    drawMethods();
    drawRun();
    drawFiltered();
  };

  // environment

  const drawEnvironment = () => {
    const rows = [];
    const add = (name, value) => {
      const row = element('tr');
      row.append(element('td', name), element('td', value));
      rows.push(row);
    };
    const say = (value) => {
      if (value === null) return 'none';
      if (Array.isArray(value)) return value.length ? value.map(say).join(', ') : 'none';
      return typeof value === 'object' ? JSON.stringify(value) : String(value);
    };
    const walk = (facts, prefix) => {
      for (const [key, value] of Object.entries(facts)) {
        if (value !== null && typeof value === 'object' && !Array.isArray(value)) walk(value, `${prefix}${key} › `);
        else add(prefix + key, say(value));
      }
    };
    if (data.environment.cpu_minutes !== null) add('CPU time of all runs', `${data.environment.cpu_minutes} minutes`);
    walk(data.environment.environment, '');
    for (const [key, values] of Object.entries(data.environment.varies)) {
      const told = values.slice(0, 5).map((entry) => `${say(entry.value)} (${entry.runs} runs)`);
      add(`${key.replaceAll('.', ' › ')} (varies)`, told.join('; ') + (values.length > 5 ? `; and ${values.length - 5} more` : ''));
    }
    $('facts-table').tBodies[0].replaceChildren(...rows);
  };

  const drawChoices = () => {
    $('choices').hidden = !data.choices.tables.length;
    $('choices-tables').replaceChildren(...data.choices.tables.map(({ title, columns, rows }) => {
      const table = element('table');
      table.createCaption().textContent = title;
      const head = table.createTHead().insertRow();
      head.append(...columns.map((name) => element('th', name, { class: 'text', scope: 'col' })));
      const body = table.createTBody();
      for (const row of rows) {
        body.insertRow().append(...row.map((text, i) => {
          const code = columns[i] === data.choices.call;
          const cell = element('td', code ? null : text, { class: text.length > 24 ? 'text settings' : 'text' });
          if (code) cell.append(element('code', text));
          return cell;
        }));
      }
      const wide = element('div', null, { class: 'wide' });
      wide.append(table);
      return wide;
    }));
  };

  // start

  const models = new Set(data.subjects.map((subject) => subject.model));
  $('lead').textContent =
    `${runs.length} runs of ${models.size} model${models.size > 1 ? 's' : ''}. Every method starts from the same noise as the uncached run it is compared with.`;
  const flawed = new Map();
  for (const run of runs.filter((each) => !each.correct)) {
    const text = `${run.model}, ${run.sampler}, ${run.method}: ${run.note}; no speed is shown`;
    flawed.set(text, (flawed.get(text) || 0) + 1);
  }
  const problems = [
    ...data.remarks,
    ...data.left_out.map((reason) => `Left out: ${reason}`),
    ...[...flawed].map(([text, count]) => (count > 1 ? `${text} (${count} runs)` : text)),
  ];
  const FIRST_PROBLEMS = 6;
  $('problems').replaceChildren(...problems.slice(0, FIRST_PROBLEMS).map((text) => element('li', text)));
  if (problems.length > FIRST_PROBLEMS) {
    $('problems').append(element('li', `and ${problems.length - FIRST_PROBLEMS} more: filter the table for “incorrect”`));
  }
  options($('subject'), data.subjects.map((s, i) => [i, `${s.model}, ${s.sampler}${s.random ? ' (random weights: speed only)' : ''}`]), 0);
  options($('budget'), Object.keys(data.budgets).map((name) => [name, name]), '1/3');
  $('subject').addEventListener('change', () => {
    state.subject = Number($('subject').value);
    drawSubject();
  });
  for (const id of ['metric', 'cost', 'front-only']) $(id).addEventListener('change', drawFront);
  for (const id of ['budget', 'sample-metric', 'by']) $(id).addEventListener('change', drawStrip);
  for (const id of ['table-subject', 'table-front']) $(id).addEventListener('change', drawTable);
  $('filter').addEventListener('input', drawTable);
  $('run').addEventListener('change', () => choose(Number($('run').value)));
  $('all-methods').addEventListener('click', () => setAll(true));
  $('no-methods').addEventListener('click', () => setAll(false));
  $('more').addEventListener('click', () => {
    state.all = true;
    drawTable();
  });
  $('large').addEventListener('click', (event) => {
    if (event.target === $('large')) $('large').close(); // the backdrop
  });
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => {
    drawHeat();
    drawFiltered();
  });
  makeTable();
  drawChoices();
  drawEnvironment();
  drawSubject();
})();
