"""The model against independent implementations: plain loops, hand-written sums, timm's own ViT."""

import itertools
import math

import pytest
import torch
from helpers import each_update, pretrain, read, scalars
from timm.models.vision_transformer import VisionTransformer
from torch.nn.functional import unfold

import utils
from mae_pretrain import block_noise, draw_noise, grid_noise
from model import (
    MAE_Encoder,
    MAE_ViT,
    PatchShuffle,
    ViT_Classifier,
    count_visible,
    random_indexes,
    take_indexes,
)

TINY = {
    "image_size": 16,
    "patch_size": 4,
    "emb_dim": 24,
    "encoder_layer": 2,
    "decoder_layer": 1,
}


def test_published_size():
    model = MAE_ViT()
    assert sum(p.numel() for p in model.parameters()) == 7_212_684
    assert sum(p.numel() for p in model.encoder.parameters()) == 5_383_680
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["encoder.cls_token"] == (1, 1, 192)
    assert shapes["encoder.pos_embedding"] == (256, 1, 192)
    assert shapes["decoder.pos_embedding"] == (257, 1, 192)
    assert "encoder.transformer.0.attn.qkv.bias" not in shapes
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}


def test_random_indexes_are_a_permutation_and_its_inverse():
    forward, backward = random_indexes(50)
    assert sorted(forward.tolist()) == list(range(50))
    assert forward[backward].tolist() == list(range(50))
    noise = torch.tensor([[0.3, 0.1, 0.2], [0.5, 0.5, 0.0]])  # ties keep their order
    forward, backward = random_indexes(3, noise)
    assert forward.tolist() == [[1, 2, 0], [2, 0, 1]]
    assert backward.tolist() == [[2, 0, 1], [1, 2, 0]]


@pytest.mark.parametrize("T", [1, 4, 9, 16, 49, 64, 100, 196, 256])
@pytest.mark.parametrize("percent", [0, 5, 10, 25, 30, 50, 60, 70, 75, 80, 90, 95, 99])
def test_exact_number_of_visible_patches(T, percent):
    exact = T * (100 - percent) // 100  # in whole numbers: T * (1 - ratio) rounded down
    visible, forward, backward = PatchShuffle(percent / 100)(torch.randn(T, 2, 3))
    assert visible.shape == (exact, 2, 3)
    assert forward.shape == backward.shape == (T, 2)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75, 0.9])
def test_hidden_pixels_are_counted_exactly(ratio):
    model = MAE_ViT(**TINY | {"image_size": 40}, mask_ratio=ratio)  # 100 patches of 4x4
    predicted_img, mask = model(torch.randn(3, 3, 40, 40))
    assert predicted_img.shape == mask.shape == (3, 3, 40, 40)
    hidden = 100 - math.floor(100 * (1 - ratio) + 1e-9)
    assert mask.sum((1, 2, 3)).tolist() == [hidden * 4 * 4 * 3] * 3
    assert set(mask.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("decoder_dim", [None, 12])
def test_shuffle_unshuffle_and_mask_agree_with_loops(decoder_dim, device):
    T, B, C, T_vis, p = 16, 3, 24, 4, 4
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    model = MAE_ViT(**TINY, mask_ratio=0.75, decoder_dim=decoder_dim).eval().to(device)
    patches, noise = torch.randn(T, B, C), torch.rand(B, T)
    noise[0], noise[1] = noise[0].round(decimals=1), 0.5  # ties, which keep their order
    patches, noise = patches.to(device), noise.to(device)
    visible, forward, backward = model.encoder.shuffle(patches, noise)
    for b in range(B):
        by_noise = sorted(range(T), key=lambda t: noise[b, t].item())
        for i in range(T_vis):
            assert torch.equal(visible[i, b], patches[by_noise[i], b])
        assert [by_noise[i] for i in backward[:, b].tolist()] == list(range(T))
    assert torch.equal(take_indexes(patches, forward), torch.stack(
        [torch.stack([patches[forward[t, b], b] for b in range(B)]) for t in range(T)]
    ))  # fmt: skip

    features = torch.randn(1 + T_vis, B, C, device=device)
    decoder = model.decoder
    predicted_img, mask = decoder(features, backward)
    if decoder_dim:
        features = features @ decoder.embed.weight.T + decoder.embed.bias
    for b in range(B):
        tokens = [features[0, b] + decoder.pos_embedding[0, 0]]
        shown = {}
        for t in range(T):
            i = int(backward[t, b])
            shown[t] = i < T_vis
            token = features[1 + i, b] if shown[t] else decoder.mask_token[0, 0]
            tokens.append(token + decoder.pos_embedding[1 + t, 0])
        pixels = decoder.head(decoder.transformer(torch.stack(tokens)[None]))[0, 1:]
        for t in range(T):
            row, column = divmod(t, 16 // p)
            for c in range(3):
                for y in range(p):
                    for x in range(p):
                        value = pixels[t, c * p * p + y * p + x]
                        where = b, c, row * p + y, column * p + x
                        assert mask[where] == (0 if shown[t] else 1)
                        torch.testing.assert_close(predicted_img[where], value, atol=1e-5, rtol=0)


def test_a_decoder_of_the_same_width_has_no_weights_that_the_source_lacks():
    torch.manual_seed(0)
    default = MAE_ViT(**TINY).state_dict()
    torch.manual_seed(0)
    same = MAE_ViT(**TINY, decoder_dim=24).state_dict()
    assert not [name for name in default if "embed." in name]
    assert default.keys() == same.keys()
    assert all(torch.equal(default[name], same[name]) for name in default)
    narrow = MAE_ViT(**TINY, decoder_dim=12).state_dict()
    assert narrow.keys() - default.keys() == {"decoder.embed.weight", "decoder.embed.bias"}
    assert narrow["decoder.embed.weight"].shape == (12, 24)


def hidden_patches(noise, ratio):
    """Which patches of each image the model hides, [n,T]."""
    T = noise.shape[1]
    _, _, backward = PatchShuffle(ratio)(torch.zeros(T, len(noise), 1), noise)
    return backward.T >= count_visible(T, ratio)


@pytest.mark.parametrize("grid, ratio", [(4, 0.5), (5, 0.75), (16, 0.75), (14, 0.4), (6, 0.95)])
def test_block_masks_hide_one_rectangle_after_the_other(grid, ratio):
    rand = torch.rand(40, 16, 4, generator=utils.generator("test", grid))
    rand[0, 0, 0] = 1 - 2**-24  # as large as can be
    rand[1, :] = 0.0  # all the same, in a corner: they grow
    noise = block_noise(rand, grid, ratio)
    masks, count = hidden_patches(noise, ratio), grid**2 - count_visible(grid**2, ratio)
    assert masks.sum(1).tolist() == [count] * 40
    for b in range(40):
        hidden = {divmod(i, grid) for i in masks[b].nonzero()[:, 0].tolist()}
        union = set()
        for area, shape, y, x in rand[b].tolist():
            low = min(16 / 196, ratio)
            area, shape = (low + (ratio - low) * area) * grid**2, (10 / 3) ** (2 * shape - 1)
            h, w = (min(grid, max(1, round(math.sqrt(s)))) for s in (area * shape, area / shape))
            top, left = int(y * (grid - h + 1)), int(x * (grid - w + 1))
            rectangle = {(top + i, left + j) for i in range(h) for j in range(w)}
            if not union | rectangle <= hidden:
                break
            union |= rectangle
        else:
            rectangle = set()
        if b == 1:  # nearest to the rectangle's centre, in and out of it
            rectangle, union = set(itertools.product(range(grid), repeat=2)), set()
        new = rectangle - union
        assert union <= hidden <= union | rectangle
        distance = {
            (i, j): max(abs(i - top - (h - 1) / 2) / h, abs(j - left - (w - 1) / 2) / w)
            for i, j in new
        }  # of the last rectangle, the middle is hidden
        inside = [distance[patch] for patch in new & hidden]
        outside = [distance[patch] for patch in new - hidden]
        assert max(inside, default=0) <= min(outside, default=9) + 1e-6


def test_grid_masks_show_a_regular_grid():
    for grid in (2, 4, 6, 16):
        rand = torch.rand(200, 2, generator=utils.generator("test", grid))
        visible = ~hidden_patches(grid_noise(rand, grid), 0.75).view(-1, grid // 2, 2, grid // 2, 2)
        corner = visible[:, :1, :, :1]  # of all 2x2 patches the same one
        assert torch.equal(visible, corner.expand_as(visible))
        assert corner.flatten(1).sum(1).tolist() == [1] * 200
        assert corner.flatten(1).float().argmax(1).unique().tolist() == [0, 1, 2, 3]
        half = hidden_patches(grid_noise(rand, grid), 0.5).view(-1, grid, grid)
        assert (half[:, 1:] != half[:, :-1]).all() and (half[:, :, 1:] != half[:, :, :-1]).all()
    visible = ~hidden_patches(grid_noise(rand, 16), 15 / 16).view(-1, 4, 4, 4, 4)
    assert torch.equal(visible, visible[:, :1, :, :1].expand_as(visible))


@pytest.mark.parametrize("masking", ["random", "block", "grid"])
def test_masks_for_any_grid_and_ratio(masking):
    rng = utils.generator("test", masking)
    for grid in (1, 2, 3, 5, 7, 8, 14, 31):
        for ratio in (0.01, 0.3, 0.5, 0.75, 0.9, 0.99):
            noise = draw_noise(masking, 5, grid**2, ratio, rng)
            assert noise.shape == (5, grid**2) and noise.dtype == torch.float32
            assert noise.isfinite().all()
            if visible := count_visible(grid**2, ratio):
                assert hidden_patches(noise, ratio).sum(1).tolist() == [grid**2 - visible] * 5
            assert not torch.equal(noise[:1].expand_as(noise), noise) or grid == 1
        again = [draw_noise(masking, 5, grid**2, 0.6, utils.generator(grid)) for _ in range(2)]
        assert torch.equal(*again)


def test_patches_come_back_as_the_image_they_were_cut_from():
    decoder, img = MAE_ViT(**TINY).decoder, torch.randn(2, 3, 16, 16)
    cut = torch.nn.functional.unfold(img, 4, stride=4)  # [B, 3*4*4 in (c p1 p2) order, T]
    assert torch.equal(decoder.patch2img(cut.permute(2, 0, 1)), img)


def test_noise_decides_and_none_draws_anew():
    model, img = MAE_ViT(**TINY).eval(), torch.randn(2, 3, 16, 16)
    noise = torch.rand(2, 16)
    assert torch.equal(model(img, noise)[0], model(img, noise)[0])
    assert not torch.equal(model(img)[1], model(img)[1])


def test_hidden_patches_do_not_reach_the_encoder():
    torch.manual_seed(0)
    model, img, noise = MAE_ViT(**TINY).eval(), torch.randn(1, 3, 16, 16), torch.rand(1, 16)
    predicted_img, mask = model(img, noise)
    other = torch.where(mask == 1, torch.randn_like(img), img)
    assert torch.equal(model(other, noise)[0], predicted_img)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("fp16", 3e-4), ("bf16", 2e-3)])
def test_loss_and_gradients_against_float64(
    precision, tolerance, norm_pix_loss, device, empty_folder
):
    """A run that does not move: its loss, and what the optimizer is given."""
    found = []

    def note(optim):
        for parameter in optim.param_groups[0]["params"]:
            found.append(parameter.grad.cpu())

    flags = "--batch_size 60 --total_epoch 1 --base_learning_rate 0 --mask_ratio 0.6".split()
    flags += ["--norm_pix_loss"] * norm_pix_loss + ["--device", device, "--precision", precision]
    with each_update(note):
        pretrain(*flags)
    content = read("vit-t-mae.pth")
    model = MAE_ViT(**content["architecture"]).double()
    model.load_state_dict(content["model"])
    images = utils.read_shapes(32, 60).train_images
    images = images[torch.randperm(60, generator=utils.generator("order", 42, 0))]
    pixels = images.double() / 255 * 2 - 1
    noise = torch.rand(60, 16, generator=utils.generator("masks", 42, 0, 0))
    found_img = model(pixels, noise)
    predicted, mask, target = (unfold(x, 8, stride=8) for x in (*found_img, pixels))  # [B,192,T]
    if norm_pix_loss:
        target = (target - target.mean(1, True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
    loss = ((predicted - target) ** 2)[mask == 1].mean()
    loss.backward()
    assert (mask == 1).sum() == 60 * 10 * 192  # 16 patches, int(16 * 0.4) = 6 of them visible
    ((_, reported),) = scalars("logs/shapes/mae-pretrain", "mae_loss")
    assert reported == pytest.approx(loss.item(), rel=tolerance)
    for a, b in zip(found, model.parameters(), strict=True):
        assert (a - b.grad).norm() <= 10 * tolerance * b.grad.norm()


def test_classifier_equals_timms_vision_transformer():
    torch.manual_seed(0)
    ours = ViT_Classifier(MAE_Encoder(32, 4, 48, num_layer=3, num_head=4), num_classes=7).eval()
    timms = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=48, depth=3, num_heads=4, num_classes=7,
        qkv_bias=False, no_embed_class=True, norm_layer=torch.nn.LayerNorm,
    ).eval()  # fmt: skip
    weights = {}
    for name, tensor in ours.state_dict().items():
        name = name.replace("transformer.", "blocks.").replace("layer_norm.", "norm.")
        name = name.replace("patchify.", "patch_embed.proj.")
        weights[name.replace("pos_embedding", "pos_embed")] = tensor
    weights["pos_embed"] = weights["pos_embed"].permute(1, 0, 2)
    timms.load_state_dict(weights, strict=True)
    img = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(img), timms(img), atol=1e-5, rtol=1e-5)


def test_classifier_trains_the_encoder_it_is_given():
    encoder = MAE_Encoder(16, 4, 24, num_layer=1)
    classifier = ViT_Classifier(encoder)
    classifier(torch.randn(2, 3, 16, 16)).sum().backward()
    assert classifier.patchify is encoder.patchify
    assert all(p.grad is not None for p in encoder.parameters())


def test_learning_rate_is_the_sources():
    def lr(epoch):
        return utils.learning_rate(epoch, 1.5e-4, 4096, 2000, 200)

    assert lr(0) == pytest.approx(2.4e-3 / 200)
    assert lr(99) == pytest.approx(2.4e-3 / 2)
    assert lr(1000) == pytest.approx(2.4e-3 / 2)
    assert lr(1999) == pytest.approx(2.4e-3 * 0.5 * (math.cos(math.pi * 1999 / 2000) + 1))
    # Where the two meet the smaller of them counts, so the peak lies a little below the base.
    assert lr(194) == pytest.approx(2.4e-3 * 195 / 200)
    assert max(range(2000), key=lr) == 195
    assert lr(195) == pytest.approx(2.4e-3 * 0.5 * (math.cos(math.pi * 195 / 2000) + 1))
    assert utils.learning_rate(0, 1e-3, 256, 10, 0) == pytest.approx(1e-3)  # no warm-up


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"image_size": 18}, "image size 18 is no multiple of patch size 4"),
        ({"emb_dim": 25}, "width 25 is no multiple"),
        ({"decoder_head": 5}, "width 24 is no multiple"),
        ({"decoder_dim": 10}, "decoder width 10 is no multiple of its heads, 3"),
        ({"mask_ratio": 1.0}, "mask ratio 1.0"),
        ({"mask_ratio": -0.1}, "mask ratio -0.1"),
        ({"mask_ratio": 0.99}, "leaves no patch"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        MAE_ViT(**TINY | sizes)
