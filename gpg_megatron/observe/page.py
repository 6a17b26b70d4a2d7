"""The report page, a Jinja template that report.py fills in."""

from __future__ import annotations

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }} - GPG run</title>
<style>
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b1f27; --faint: #626b79; --rule: #e1e5eb;
  --good: #1a7f4b; --bad: #b3372f;
  --c0: #2563c9; --c1: #d9730d; --c2: #23885a; --c3: #8250c4; --c4: #b8860b; --c5: #8b939f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12151a; --card: #1a1e25; --ink: #e4e7ec; --faint: #98a1b0; --rule: #2b313b;
    --good: #58c48c; --bad: #f08a80;
    --c0: #6ea4ff; --c1: #f59a4a; --c2: #5cc596; --c3: #b693f2; --c4: #e0bd4f; --c5: #8f98a6;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 36px 20px 60px; }
h1 { font-size: 27px; line-height: 1.2; margin: 0; letter-spacing: -.01em;
  overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 38px 0 12px; }
h3 { font-size: 15px; margin: 0; }
p { margin: 4px 0 0; color: var(--faint); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(158px, 1fr));
  gap: 12px; margin-top: 24px; }
.tile, figure, .table, details { background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px; }
.tile { padding: 13px 16px; }
.tile b { display: block; font-size: 24px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span, .tile small { display: block; font-size: 13px; }
.tile small { color: var(--faint); overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr));
  gap: 14px; }
figure { margin: 0; padding: 15px 16px 8px; min-width: 0; }
figure p { font-size: 13px; margin: 0 0 8px; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
.table { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 13.5px; }
th, td { padding: 8px 12px; text-align: left; vertical-align: top;
  border-top: 1px solid var(--rule); }
thead th { border-top: 0; color: var(--faint); font-weight: 600; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.right { color: var(--good); white-space: nowrap; }
td.wrong { color: var(--bad); white-space: nowrap; }
pre { margin: 0; font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 15em; overflow-y: auto; }
code { font: 12.5px ui-monospace, "DejaVu Sans Mono", monospace; }
details { margin-top: 14px; }
summary { cursor: pointer; padding: 12px 16px; font-weight: 600; }
details > pre { padding: 4px 16px 16px; max-height: none; }
details table { margin-bottom: 6px; }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p>GPG training run · {{ subtitle }}</p>
<div class="tiles">
{% for value, label, remark in tiles %}
<div class=tile><b>{{ value }}</b><span>{{ label }}</span><small>{{ remark }}</small></div>
{% endfor %}
</div>
<h2>How it went</h2>
<div class="charts">
{% for title, remark, svg in charts %}
<figure aria-label="{{ title }}"><h3>{{ title }}</h3><p>{{ remark }}</p>{{ svg | safe }}</figure>
{% endfor %}
</div>
<h2>Completions of the first and the last step</h2>
{% if samples %}
<div class="table"><table>
<thead><tr><th>step</th><th>prompt</th><th>truth</th><th>response</th><th>verdict</th>
<th class=n>advantage</th></tr></thead>
{% for rows in samples %}
{% for row in rows %}
<tr>
{% if loop.first %}
<td rowspan={{ rows | length }}>{{ row.step }}</td>
<td rowspan={{ rows | length }}><pre>{{ row.prompt }}</pre></td>
<td rowspan={{ rows | length }}><pre>{{ row.ground_truth }}</pre></td>
{% endif %}
<td><pre>{{ row.response }}</pre></td>
<td class={{ "right" if row.accuracy == 1 else "wrong" }}>
{{- "✓ right" if row.accuracy == 1 else "✗ wrong" }}
{%- if row.reward != row.accuracy %} ({{ row.reward | number }}){% endif %}</td>
<td class=n>{{ row.advantage | number }}</td>
</tr>
{% endfor %}
{% endfor %}
</table></div>
{% else %}
<p>No completions were written (logging.rollout_samples is 0).</p>
{% endif %}
<h2>Details</h2>
<details><summary>All metrics</summary>
<table><thead><tr><th>metric</th>
{% for name in ("first", "last", "min", "max") %}<th class=n>{{ name }}</th>{% endfor %}
</tr></thead>
{% for key, values in metrics %}
<tr><td><code>{{ key }}</code></td>
{% for value in values %}<td class=n>{{ value | number }}</td>{% endfor %}
</tr>
{% endfor %}
</table></details>
<details><summary>Configuration</summary><pre>{{ config }}</pre></details>
</main>
</body>
</html>
"""
