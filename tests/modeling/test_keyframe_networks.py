"""Grid geometry, warp, filter, networks of keyframe propagation, against naive loops, torch and fixed counts."""

import itertools

import numpy as np
import pytest
import torch
from tolerances import assert_close
from torch.nn import functional as F

from the_mask.modeling.propagation import CopyPropagator, GSVNet, WarpPropagator, geometry
from the_mask.modeling.propagation.filtering import (
    delay_kernels,
    displacements,
    dynamic_filter,
    edge_map,
    filter_weights,
)
from the_mask.modeling.propagation.networks import GuideNet, IntraNet, LightFlowNet
from the_mask.modeling.propagation.official import gsvnet_state

SIZES = [(16, 32), (90, 120), (67, 90), (5, 7), (1, 1)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def naive_read(x, rows, columns):
    """Bilinear reading in float64, one value at a time; x [C, h, w]."""
    x = x.double().numpy()
    h, w = x.shape[1:]
    out = np.zeros((x.shape[0], len(rows), len(columns)))
    for (i, r), (j, c) in itertools.product(enumerate(rows.tolist()), enumerate(columns.tolist())):
        r, c = min(max(r, 0), h - 1), min(max(c, 0), w - 1)
        r0, c0 = int(r), int(c)
        r1, c1 = min(r0 + 1, h - 1), min(c0 + 1, w - 1)
        a, b = r - r0, c - c0
        out[:, i, j] = (1 - a) * ((1 - b) * x[:, r0, c0] + b * x[:, r0, c1]) + a * (
            (1 - b) * x[:, r1, c0] + b * x[:, r1, c1]
        )
    return torch.from_numpy(out)


def naive_warp(x, flow):
    """Backward bilinear warp in float64 with zeros outside; x [C, h, w], flow [2, h, w]."""
    x, flow = x.double().numpy(), flow.double().numpy()
    h, w = x.shape[1:]
    out = np.zeros_like(x)
    for i, j in itertools.product(range(h), range(w)):
        row, column = i + flow[1, i, j], j + flow[0, i, j]
        r0, c0 = int(np.floor(row)), int(np.floor(column))
        for r, c in itertools.product((r0, r0 + 1), (c0, c0 + 1)):
            if 0 <= r < h and 0 <= c < w:
                out[:, i, j] += (1 - abs(row - r)) * (1 - abs(column - c)) * x[:, r, c]
    return torch.from_numpy(out)


def naive_filter(scores, weights, shifts, intra, zeros):
    """Equation 5 in float64: chunks are built and multiplied, one cell at a time; [C, h, w], [K, h, w]."""
    channels, h, w = scores.shape
    scores, weights = scores.double().numpy(), weights.double().numpy()
    out = np.zeros((channels, h, w))
    for c, i, j in itertools.product(range(channels), range(h), range(w)):
        chunk = [scores[c, i, j]]
        for dy, dx in shifts:
            inside = 0 <= i + dy < h and 0 <= j + dx < w
            chunk.append(scores[c, i + dy, j + dx] if inside else 0.0)
        chunk += [0.0] * zeros
        if intra is not None:
            chunk.append(float(intra[c, i, j]))
        out[c, i, j] = np.dot(weights[:, i, j], chunk)
    return torch.from_numpy(out)


class TestGeometry:
    @pytest.mark.parametrize("size", [(64, 96), (50, 71), (7, 5)])
    def test_reading_equals_a_loop(self, size):
        x = draw(3, *size)
        rows, columns = 9 * torch.rand(4).double() - 1, 80 * torch.rand(6).double() - 2
        torch.testing.assert_close(geometry.read_at(x, rows, columns).double(), naive_read(x, rows, columns))

    def test_downscaling_equals_interpolate(self):
        frames = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
        half_pixel = F.interpolate(frames.float(), size=(8, 12), mode="bilinear", align_corners=False)
        corners = F.interpolate(frames.float(), size=(8, 12), mode="bilinear", align_corners=True)
        torch.testing.assert_close(geometry.downscale_frames(frames, 8), half_pixel)
        # torch computes the positions in float32.
        assert_close(geometry.downscale_frames(frames, 8, align_corners=True), corners, "colour")

    def test_grid_change_equals_interpolate(self):
        scores = draw(5, 16, 24)
        smaller = F.interpolate(scores[None], size=(8, 12), mode="bilinear", align_corners=False)[0]
        larger = F.interpolate(scores[None], size=(32, 48), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(geometry.to_grid(scores, (64, 96), 8, 4), smaller)
        torch.testing.assert_close(geometry.to_grid(scores, (64, 96), 2, 4), larger)
        # A segmentor's input of 3/4 of the size.
        scaled = geometry.to_grid(draw(5, 12, 18), (64, 96), 8, 4, scale=0.75)
        expected = F.interpolate(draw(5, 12, 18)[None], size=(8, 12), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(scaled, expected)

    @pytest.mark.parametrize("align_corners", [False, True])
    def test_a_ramp_keeps_its_place(self, align_corners):
        """Values that say where they are: cells of every grid must read the pixel they lie on."""
        size = (61, 83)
        ramp = torch.arange(size[1], dtype=torch.float32).expand(1, *size)
        small = geometry.downscale_frames(ramp[None].expand(1, 3, -1, -1), 4, align_corners)[0, :1]
        where = geometry.cell_centres(small.shape[-1], 4, size[1], align_corners, None).clamp(0, size[1] - 1)
        torch.testing.assert_close(small[0, 3].double(), where)
        if align_corners:
            back = geometry.from_aligned_grid(small, size, 4)
            plain = geometry.cell_centres(21, 4, size[1], False, None).clamp(0, size[1] - 1)
            assert_close(back[0, 3], plain, "position")


class TestWarp:
    def test_zero_flow_is_identity(self):
        x = draw(2, 5, 9, 13)
        assert_close(geometry.warp(x, torch.zeros(2, 2, 9, 13)), x, "layer")

    def test_constant_flow_shifts(self):
        """Flow (x=+1, y=0) reads the cell to the right: the picture moves left."""
        x = draw(1, 3, 6, 8)
        flow = torch.zeros(1, 2, 6, 8)
        flow[:, 0] = 1
        moved = geometry.warp(x, flow)
        assert_close(moved[..., :-1], x[..., 1:], "network")
        assert moved[..., -1].abs().max() == 0
        flow = torch.zeros(1, 2, 6, 8)
        flow[:, 1] = -2
        moved = geometry.warp(x, flow)
        assert_close(moved[..., 2:, :], x[..., :-2, :], "network")

    @pytest.mark.parametrize("size", [(6, 9), (1, 4), (5, 1)])
    def test_equals_a_loop(self, size):
        x, flow = draw(2, 3, *size), 3 * draw(2, 2, *size, seed=1)
        expected = torch.stack([naive_warp(a, b) for a, b in zip(x, flow)])
        assert_close(geometry.warp(x, flow), expected, "peer")

    def test_positions_stay_exact_under_autocast(self):
        x, flow = draw(1, 3, 16, 256), draw(1, 2, 16, 256)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_close(geometry.warp(x, flow), geometry.warp(x, flow.float()), "same")
            assert geometry.warp(x, flow).dtype == torch.float32


class TestFilter:
    def test_displacements(self):
        assert displacements(1) == [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]
        assert len(displacements(3)) == 16
        assert displacements(3)[8:] == [(3 * dy, 3 * dx) for dy, dx in displacements(1)]
        with pytest.raises(ValueError, match=r"MODEL\.KEYFRAME\.REACH is 0"):
            displacements(0)

    @pytest.mark.parametrize(
        ("reach", "zeros", "with_intra"), [(1, 1, True), (1, 0, True), (2, 0, False), (4, 0, True)]
    )
    @pytest.mark.parametrize("size", [(5, 7), (1, 1), (3, 2)])
    def test_equals_a_loop(self, reach, zeros, with_intra, size):
        shifts = displacements(reach)
        slots = 1 + len(shifts) + zeros + with_intra
        scores, weights = draw(2, 4, *size), draw(2, slots, *size, seed=1)
        intra = draw(2, 4, *size, seed=2) if with_intra else None
        expected = torch.stack(
            [naive_filter(scores[b], weights[b], shifts, None if intra is None else intra[b], zeros) for b in range(2)]
        )
        assert_close(dynamic_filter(scores, weights, shifts, intra, zeros), expected, "layer")

    def test_equals_correlation_with_the_stored_kernels(self):
        """The released code's way: 3-D convolution with impulse kernels, the ninth of zeros."""
        shifts, scores, weights = displacements(1), draw(2, 4, 6, 7), draw(2, 10, 6, 7, seed=1)
        copies = F.conv3d(scores[:, None], delay_kernels(shifts, extra=1), padding=(0, 1, 1))
        slots = torch.cat([scores[:, None], copies], dim=1)
        expected = (slots * weights[:, :, None]).sum(dim=1)
        torch.testing.assert_close(dynamic_filter(scores, weights, shifts, None, zeros=1), expected)

    def test_gradient(self):
        shifts = displacements(1)
        inputs = [draw(1, 2, 3, 4).double(), draw(1, 10, 3, 4).double(), draw(1, 2, 3, 4, seed=3).double()]
        for tensor in inputs:
            tensor.requires_grad_()
        assert torch.autograd.gradcheck(lambda s, w, a: dynamic_filter(s, w, shifts, a), inputs)

    def test_one_hot_weight_on_the_map_itself(self):
        scores, weights = draw(1, 3, 4, 5), torch.zeros(1, 11, 4, 5)
        weights[:, 0] = 1
        torch.testing.assert_close(
            dynamic_filter(scores, weights, displacements(1), draw(1, 3, 4, 5, seed=1), 1), scores
        )

    def test_weights_have_unity_gain(self):
        raw = draw(2, 11, 5, 6)
        for kind in ("relu", "softmax"):
            weights = filter_weights(raw, kind)
            assert weights.min() >= 0
            torch.testing.assert_close(weights.sum(dim=1), torch.ones(2, 5, 6))
        assert filter_weights(-raw.abs(), "relu").abs().max() == 0

    def test_wrong_number_of_weights(self):
        with pytest.raises(ValueError, match="9 filter weights for 10 slots"):
            dynamic_filter(draw(1, 2, 4, 4), draw(1, 9, 4, 4), displacements(1), draw(1, 2, 4, 4))


class TestEdges:
    def test_laplacian_of_released_code(self):
        labels = torch.randint(0, 5, (2, 7, 9))
        kernel = torch.ones(1, 1, 3, 3)
        kernel[..., 1, 1] = -8
        laplacian = F.conv2d(labels[:, None].float(), kernel, padding=1)
        torch.testing.assert_close(edge_map(labels, "laplacian"), (laplacian != 0).float())
        torch.testing.assert_close(edge_map(labels, "sigmoid"), laplacian.sigmoid())

    def test_borders_and_cancellation(self):
        """Class numbers 0, 1, 2 in columns cancel in the Laplacian; the agnostic map sees them."""
        labels = torch.tensor([[0, 1, 2]] * 5)[None]
        assert edge_map(labels, "laplacian")[0, 0, 2, 1] == 0
        assert edge_map(labels, "differs")[0, 0, 2].tolist() == [1, 1, 1]
        uniform = torch.full((1, 4, 4), 3)
        assert edge_map(uniform, "laplacian")[0, 0, 0, 0] == 1
        assert edge_map(uniform, "differs").sum() == 0

    def test_unknown_kind(self):
        with pytest.raises(ValueError, match="edge map 'sobel'"):
            edge_map(torch.zeros(1, 2, 2, dtype=torch.long), "sobel")


class TestNetworks:
    def test_parameter_counts(self):
        assert count(LightFlowNet()) == 186_402
        assert count(IntraNet(19)) == 15_763
        assert count(GuideNet(20, 11)) == 194_241
        model = GSVNet(19, "official")
        assert count(model) == 396_406
        assert sum(buffer.numel() for buffer in model.grm.ideal_dk.buffers()) == 81

    def test_names_of_released_checkpoints(self):
        names = set(GSVNet(19, "official").state_dict())
        norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

        def block(prefix, conv, bn):
            return {f"{prefix}.{conv}.weight", f"{prefix}.{conv}.bias"} | {f"{prefix}.{bn}.{n}" for n in norm}

        expected = {"flow.toflow.weight", "flow.toflow.bias", "grm.ideal_dk.filter_copy_s"}
        for layer in ("conv1", "conv2", "conv_merge", *(f"conv_dilate_{i}" for i in (1, 2, 3, 4))):
            expected |= block(f"flow.{layer}", 0, 1)
        intra, guide = "grm.intra_net.intra_net", "grm.guide"
        expected |= block(intra, 0, 1) | block(intra, 3, 4) | {f"{intra}.6.weight", f"{intra}.6.bias"}
        expected |= block(f"{guide}.guide_conv", 0, 1)
        expected |= block(f"{guide}.guide_conv_feat", 0, 1) | block(f"{guide}.guide_conv_feat", 3, 4)
        expected |= block(f"{guide}.guide_deconv", 1, 2) | block(f"{guide}.guide_deconv", 5, 6)
        expected |= block(f"{guide}.guide_decoder", 0, 1)
        assert names == expected

    def test_released_checkpoint_layout_loads(self):
        source = GSVNet(19, "official").state_dict()
        release = {
            "state_dict": {f"module.{k}": v for k, v in source.items() if k.startswith("grm.")},
            "state_dict_of": {k.removeprefix("flow."): v for k, v in source.items() if k.startswith("flow.")},
        }
        GSVNet(19, "official").load_state_dict(gsvnet_state(release))
        with pytest.raises(ValueError, match="state_dict_of is missing"):
            gsvnet_state({"state_dict": {}})

    def test_foreign_kernels_are_refused(self):
        state = GSVNet(19, "official").state_dict()
        state["grm.ideal_dk.filter_copy_s"] = state["grm.ideal_dk.filter_copy_s"].roll(1, 0)
        with pytest.raises(ValueError, match="filter_copy_s holds other displacement kernels"):
            GSVNet(19, "official").load_state_dict(state)

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("variant", ["paper", "official", "agnostic"])
    def test_any_size(self, variant, size):
        model = GSVNet(4, variant).eval()
        result = model(draw(1, 4, *size), draw(1, 3, *size), draw(1, 3, *size, seed=1))
        assert result.scores.shape == (1, 4, *size)
        assert result.flow.shape == (1, 2, *size)
        assert torch.isfinite(result.scores).all()

    def test_flow_is_the_resized_output_over_four(self):
        flow = LightFlowNet().eval()
        frame, previous = draw(1, 3, 16, 32), draw(1, 3, 16, 32, seed=1)
        x = flow.conv2(flow.conv1(torch.cat([frame, previous], dim=1)))
        d1, d2, d3, d4 = (getattr(flow, f"conv_dilate_{i}")(x) for i in (1, 2, 3, 4))
        merged = flow.conv_merge(torch.cat([d1, d1 + d2, d1 + d2 + d3, d1 + d2 + d3 + d4], dim=1)) + x
        expected = F.interpolate(flow.toflow(merged), size=(16, 32), mode="bilinear", align_corners=True) / 4
        assert_close(flow(frame, previous), expected, "network")
        assert expected.shape[-2:] == (16, 32)
        assert x.shape[-2:] == (4, 8)

    def test_variants_without_intra(self):
        model = GSVNet(4, "paper", intra=False).eval()
        result = model(draw(1, 4, 8, 8), draw(1, 3, 8, 8), draw(1, 3, 8, 8))
        assert result.intra is None
        assert result.intra_weight is None
        assert model.grm.guide.guide_decoder[0].out_channels == 9
        with pytest.raises(ValueError, match="official has intra features"):
            GSVNet(4, "official", intra=False)
        with pytest.raises(ValueError, match="VARIANT 'own'"):
            GSVNet(4, "own")


class TestPropagators:
    @pytest.mark.parametrize("make", [CopyPropagator, WarpPropagator, lambda: GSVNet(4, "agnostic")])
    def test_batch_equals_one_by_one(self, make):
        model = make().eval()
        inputs = [draw(3, 4, 9, 11), draw(3, 3, 9, 11, seed=1), draw(3, 3, 9, 11, seed=2), draw(3, 6, 9, 11, seed=3)]
        together = model(*inputs)
        for b in range(3):
            alone = model(*(x[b : b + 1] for x in inputs))
            row = together.row(b)
            assert_close(row.scores, alone.scores, "network")
            assert_close(row.queries, alone.queries, "network")
            assert_close(row.warp_error, alone.warp_error, "network")

    def test_masks_move_like_classes_without_their_intra_slot(self):
        """A query's channel equal to a class channel gets the filter without the intra slot, renormalised."""
        model = GSVNet(4, "agnostic").eval()
        scores, frame, previous = draw(1, 4, 9, 11), draw(1, 3, 9, 11, seed=1), draw(1, 3, 9, 11, seed=2)
        queries = draw(1, 7, 9, 11, seed=5)
        result = model(scores, frame, previous, queries)
        flow = model.flow(frame, previous)
        warped = geometry.warp(scores, flow)
        features, _ = model.grm.intra_net(frame)
        raw = model.grm.guide(torch.cat([features, edge_map(warped.argmax(dim=1), "differs")], dim=1))
        weights = raw.softmax(dim=1)[:, :-1]
        weights = weights / weights.sum(dim=1, keepdim=True)
        expected = dynamic_filter(geometry.warp(queries, flow), weights, displacements(1))
        assert_close(result.queries, expected, "network")
        # The number of masks is free.
        assert model(scores, frame, previous, draw(1, 1, 9, 11)).queries.shape == (1, 1, 9, 11)

    def test_other_variants_refuse_masks(self):
        with pytest.raises(ValueError, match="VARIANT agnostic"):
            GSVNet(4, "paper")(draw(1, 4, 8, 8), draw(1, 3, 8, 8), draw(1, 3, 8, 8), draw(1, 2, 8, 8))

    def test_copy_keeps_everything(self):
        scores = draw(1, 4, 5, 6)
        result = CopyPropagator()(scores, draw(1, 3, 5, 6), draw(1, 3, 5, 6, seed=1))
        assert result.scores is scores
        expected = (draw(1, 3, 5, 6) - draw(1, 3, 5, 6, seed=1)).abs().mean()
        torch.testing.assert_close(result.warp_error, expected[None])
