import torch
from torch import Tensor

from fourge.methods.hessian import Curvature
from fourge.methods.packing import pack_values
from fourge.methods.sweep import group_steps, row_chunks, sweep
from fourge.nvfp4 import e2m1, e4m3
from fourge.nvfp4.quantize import GROUP_SIZE, QuantizedWeight

OPT = dict(start="old", window=4, steps=3)

def replay(weight, scales, global_scale, curvature):
    values = torch.empty_like(weight, dtype=curvature.cost.dtype)
    chosen = torch.empty_like(scales)
    for rows in row_chunks(weight):
        v, s = _replay(weight[rows].to(values), scales[rows].to(values), global_scale.to(values), curvature)
        values[rows] = v.T
        chosen[rows] = s.T.to(chosen)
    return pack_values(values, chosen, global_scale)

def _replay(weight, scales, G, curvature):
    work = weight.T.contiguous()
    values = torch.empty_like(work)
    old = scales.T.contiguous()
    chosen = torch.empty_like(old)

    def commit(columns, block):
        g = columns.start // GROUP_SIZE
        original = weight[:, columns].T.contiguous()
        feedback = curvature.feedback[columns, columns].T.contiguous()
        cost = curvature.cost[columns]
        prop = proposal(original, block, feedback, cost, old[g], G)
        cands = candidates(prop, old[g])
        best, value, residual = replay_group(original, block, feedback, cost, cands, G)
        values[columns] = value
        chosen[g] = best
        block.copy_(residual)

    sweep(work, curvature.feedback, GROUP_SIZE, commit)
    return values, chosen

def proposal(original, block, feedback, cost, old, G):
    # y_j = targets with no rounding of this group: block + strictly-lower feedback @ original
    y = block + torch.tril(feedback, -1) @ original
    w0 = torch.linalg.solve_triangular(feedback, y, upper=False, unitriangular=True)
    if OPT["start"] == "old": step = old / G
    elif OPT["start"] == "w0": step = (w0.abs().amax(0) / 6).clamp(min=2**-9/G)
    for _ in range(OPT["steps"]):
        q = feedback @ e2m1.round(w0 / step)
        q_cost = q * cost[:, None]
        num = (q_cost * y).sum(0)
        den = (q_cost * q).sum(0)
        step = torch.where(num > 0, num / den, step)
    return step * G

def candidates(prop, old):
    code = e4m3.encode(prop.clamp(e4m3.MIN_POSITIVE, e4m3.MAX)).view(torch.uint8).to(torch.int16)
    W = OPT["window"]
    offsets = torch.arange(-W, W + 1, device=code.device, dtype=torch.int16)
    codes = (code + offsets[:, None]).clamp_(1, 126).to(torch.uint8).view(torch.float8_e4m3fn).to(prop)
    return torch.cat([old[None], codes])

def replay_group(original, block, feedback, cost, cands, G):
    steps = cands / G
    C, R = steps.shape
    values = torch.empty(GROUP_SIZE, C, R, dtype=steps.dtype, device=steps.device)
    residuals = torch.empty_like(values)
    score = torch.zeros_like(steps)
    for j in range(GROUP_SIZE):
        target = torch.mv(residuals[:j].view(j, C * R).T, feedback[j, :j]).view(C, R).add_(block[j])
        value = values[j].copy_(e2m1.round(target / steps))
        rounded = value * steps
        torch.sub(original[j], rounded, out=residuals[j])
        miss = target.sub_(rounded)
        score.addcmul_(miss, miss, value=cost[j].item())
    best = score.argmin(0, keepdim=True)
    take = best.expand(GROUP_SIZE, 1, R)
    return cands.gather(0, best)[0], values.gather(1, take)[:, 0], residuals.gather(1, take)[:, 0]
