"""Ours against the best of several peers, of which some ran in another call:

    python3 benches/peers/best.py OURS PEERS STORED --ceilings OURS STORED [--pass bwd]

OURS and PEERS are of one call (`flashattn bench --json`, shared/peers/peers.py, or this folder's records of them), STORED of another.
What only STORED has is scaled to OURS' call: by --ceilings, the TFLOP/s of the 8192³ product in the two calls; and, to see what that
leaves out, by each shape's ratio of a peer (cuDNN) that ran in both."""
import argparse, json, math


def rows(path, which):
    data = json.load(open(path))
    data = data["rows"] if isinstance(data, dict) else data
    key = lambda r: (r["head_dim"], r["causal"], r["seqlen"])
    return {(key(r), r["peer"]): r["tflops"] for r in data if r["pass"] == which and r["dtype"] == "bf16"}


def mean(ratios):
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


p = argparse.ArgumentParser()
for name in ("ours", "peers", "stored"):
    p.add_argument(name)
p.add_argument("--ceilings", nargs=2, type=float, required=True)
p.add_argument("--pass", dest="which", default="bwd")
p.add_argument("--both", default="cudnn", help="the peer that ran in both calls")
a = p.parse_args()
ours, peers, stored = (rows(path, a.which) for path in (a.ours, a.peers, a.stored))
by_ceiling, by_peer, same_call = {}, {}, []
for (shape, _), mine in sorted(ours.items()):
    live = {peer: speed for (s, peer), speed in peers.items() if s == shape}
    far = {peer: speed for (s, peer), speed in stored.items() if s == shape and peer not in live}
    best = lambda scale: max([*((speed, peer) for peer, speed in live.items()), *((speed * scale, peer) for peer, speed in far.items())])
    ceiling, ratio = a.ceilings[0] / a.ceilings[1], live[a.both] / stored[shape, a.both]
    by_ceiling[shape], by_peer[shape] = mine / best(ceiling)[0], mine / best(ratio)[0]
    same_call.append(mine / live[a.both])
    print(f"{a.which} d={shape[0]:3} causal={int(shape[1])} n={shape[2]:5}  ours {mine:.0f}  best {best(ceiling)[0]:.0f} ({best(ceiling)[1]})  "
          f"ratio {by_ceiling[shape]:.3f}; scaled by {a.both} {by_peer[shape]:.3f}; {a.both} {ratio / ceiling:.3f} of its scaled figure")
print(f"of {a.both}: {mean(same_call):.3f}, worst {min(same_call):.3f}")
for name, ratios in (("the ceilings", by_ceiling), (a.both, by_peer)):
    dims = {d: f"{mean([r for s, r in ratios.items() if s[0] == d]):.3f}" for d in sorted({s[0] for s in ratios})}
    print(f"of the best, scaled by {name}: {mean(ratios.values()):.3f}, worst {min(ratios.values()):.3f}, by head_dim {dims}")
