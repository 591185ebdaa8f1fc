"""The look of the HTML report, and the few lines of script that sort its tables and show the values of marks."""

from __future__ import annotations

CSS = """
:root{color-scheme:light;--ink:#1c2430;--soft:#566173;--line:#dde2ea;--page:#f5f7fa;--card:#fff;--link:#1f5fbf}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,"Segoe UI","DejaVu Sans",sans-serif}
header,nav,main,footer{max-width:1120px;margin:0 auto;padding:0 20px}
header{padding-top:28px}
h1{font-size:1.75rem;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:1.15rem;margin:0 0 10px}
p{margin:8px 0;max-width:90ch}
.question{color:var(--soft);font-size:1.02rem;margin:0}
.badge{display:inline-block;padding:2px 11px;border-radius:99px;font-weight:600;font-size:.86rem;border:1px solid}
.good{background:#e3f5e8;color:#14602e;border-color:#9fd3b0}
.bad{background:#fde8e7;color:#93211a;border-color:#efb0ab}
.unsure{background:#fff3d9;color:#744c00;border-color:#e8cd8d}
.plain{background:#e9edf4;color:#36435a;border-color:#c9d2e0}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;padding-top:10px;padding-bottom:12px;font-size:.92rem}
a{color:var(--link)}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:18px 22px;margin:0 0 16px}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:0 0 4px}
.facts div{background:var(--page);border:1px solid var(--line);border-radius:8px;padding:9px 13px}
.facts .wide{grid-column:span 2}
.facts .wide dd{font-size:1.02rem;white-space:pre-line}
.facts dt{color:var(--soft);font-size:.82rem}
.facts dd{margin:0;font-size:1.18rem;font-weight:600;overflow-wrap:anywhere}
.facts small{display:block;color:var(--soft);font-size:.8rem;font-weight:400}
figure{margin:8px 0}
figure svg{width:100%;height:auto;display:block}
figure svg text{font-family:system-ui,"Segoe UI","DejaVu Sans",sans-serif!important}
figcaption{color:var(--soft);font-size:.88rem;max-width:100ch}
.scroll{overflow-x:auto;margin:10px 0}
table{border-collapse:collapse;font-size:.9rem;min-width:40%}
.caption{color:var(--soft);font-size:.9rem;margin:10px 0 0}
th,td{border-bottom:1px solid var(--line);padding:5px 11px;text-align:left;vertical-align:top}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
th{background:var(--page);white-space:nowrap}
th button{all:unset;cursor:pointer;font-weight:600}
th button:focus-visible,summary:focus-visible,.scroll:focus-visible,a:focus-visible{outline:2px solid var(--link)}
th[aria-sort=ascending] button:after{content:" \\25B4"}
th[aria-sort=descending] button:after{content:" \\25BE"}
tbody tr:hover{background:#f2f6fd}
code,pre{font-family:ui-monospace,"DejaVu Sans Mono",monospace;font-size:.88em}
code{background:#eef1f6;border-radius:4px;padding:1px 5px;overflow-wrap:anywhere}
pre{overflow-x:auto;background:var(--page);padding:12px;border-radius:8px}
summary{cursor:pointer;color:var(--link);margin:8px 0}
footer{color:var(--soft);font-size:.84rem;padding-bottom:30px}
#tip{position:fixed;pointer-events:none;background:#1c2430;color:#fff;padding:4px 9px;border-radius:6px;
font-size:.82rem;max-width:420px;z-index:9;white-space:pre-line}
@media print{body{background:#fff}nav{display:none}section{break-inside:avoid;border:0;padding:0}}
"""

SCRIPT = """
document.querySelectorAll('th button').forEach(function(button){button.addEventListener('click',function(){
var th=button.closest('th'),row=th.parentNode,i=Array.prototype.indexOf.call(row.children,th);
var up=th.getAttribute('aria-sort')!=='ascending',body=th.closest('table').tBodies[0];
Array.prototype.forEach.call(row.children,function(other){other.removeAttribute('aria-sort')});
th.setAttribute('aria-sort',up?'ascending':'descending');
function key(tr){var td=tr.children[i],v=td.getAttribute('data-v');
if(v===null)return td.textContent;return v===''?null:parseFloat(v)}
Array.from(body.rows).map(function(tr){return [key(tr),tr]}).sort(function(a,b){a=a[0];b=b[0];
if(a===null||b===null)return (a===null)-(b===null);
var d=typeof a==='number'&&typeof b==='number'?a-b:String(a).localeCompare(String(b),undefined,{numeric:true});
return up?d:-d}).forEach(function(pair){body.appendChild(pair[1])})})});
var tip=document.getElementById('tip');
document.querySelectorAll('figure svg').forEach(function(svg){
svg.addEventListener('pointermove',function(event){
var mark=event.target.closest('g[data-tip]');if(!mark){tip.hidden=true;return}
tip.textContent=mark.getAttribute('data-tip');tip.hidden=false;
tip.style.left=Math.max(4,Math.min(event.clientX+14,innerWidth-tip.offsetWidth-8))+'px';
tip.style.top=Math.max(4,event.clientY-tip.offsetHeight-10)+'px'});
svg.addEventListener('pointerleave',function(){tip.hidden=true})});
"""
