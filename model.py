"""Masked autoencoder (MAE) of a tiny Vision Transformer, and the classifier made from its encoder.

"Masked Autoencoders Are Scalable Vision Learners", https://arxiv.org/abs/2111.06377, section 3.
The file is in the order in which data flows: shuffle, encoder, decoder, both together, classifier.

Shapes: B images, T patches per image, T_vis of them visible, C embedding width, [T,B,C] tokens with
the cls token first. A mask is 1 where a patch is hidden and 0 where the encoder saw it.
"""

import torch
from einops import rearrange
from einops.layers.torch import Rearrange
from timm.models.vision_transformer import Block
from torch.nn.init import trunc_normal_


class SizeError(ValueError):
    """Sizes of a model that do not fit together."""


def random_indexes(size, noise=None):
    """A random permutation of `size` items, the order that sorts the noise, and its inverse.

    noise [..., size], or None to draw [size] -> forward_indexes, backward_indexes of its shape.
    """
    noise = torch.rand(size) if noise is None else noise
    forward_indexes = noise.argsort(dim=-1, stable=True)  # stable: ties sort alike on every device
    backward_indexes = forward_indexes.argsort(dim=-1)
    return forward_indexes, backward_indexes


def take_indexes(sequences, indexes):
    """Gather along dim 0: sequences [S,B,C], indexes [T,B] -> [T,B,C]."""
    return torch.gather(sequences, 0, indexes.unsqueeze(-1).expand(-1, -1, sequences.shape[-1]))


def count_visible(num_patches, mask_ratio):
    """int(T * (1 - ratio)), and rounding cannot lose a patch: 100 patches at 0.9 keep 10, not 9."""
    return int(num_patches * (1 - mask_ratio) + 1e-6)


def transformer_blocks(emb_dim, num_layer, num_head):
    # The published weights belong to LayerNorm's eps of 1e-5; timm's own default is 1e-6 today.
    blocks = [Block(emb_dim, num_head, norm_layer=torch.nn.LayerNorm) for _ in range(num_layer)]
    return torch.nn.Sequential(*blocks)


class PatchShuffle(torch.nn.Module):
    """Keeps a random subset of the patches (paper, section 3, "Simple implementation").

    Raises SizeError unless 0 <= ratio < 1.
    """

    def __init__(self, ratio):
        super().__init__()
        if not 0 <= ratio < 1:
            raise SizeError(f"mask ratio {ratio} is not in [0, 1)")
        self.ratio = ratio

    def forward(self, patches, noise=None):
        """patches [T,B,C] -> visible [T_vis,B,C], forward_indexes [T,B], backward_indexes [T,B].

        Image b keeps the T_vis patches of smallest noise[b]; noise is [B,T], None draws it afresh.
        """
        T, B, C = patches.shape
        if noise is None:
            noise = torch.rand(B, T, device=patches.device)
        forward_indexes, backward_indexes = random_indexes(T, noise)  # [B,T] each
        forward_indexes, backward_indexes = forward_indexes.T, backward_indexes.T
        visible = take_indexes(patches, forward_indexes[: count_visible(T, self.ratio)])
        return visible, forward_indexes, backward_indexes


class MAE_Encoder(torch.nn.Module):
    """A Vision Transformer that sees the visible patches only.

    Raises SizeError if the patches do not tile the image, the heads do not divide the width, or
    the mask ratio leaves no patch visible.
    """

    def __init__(
        self, image_size=32, patch_size=2, emb_dim=192, num_layer=12, num_head=3, mask_ratio=0.75
    ):
        super().__init__()
        num_patches = (image_size // patch_size) ** 2
        if image_size % patch_size:
            raise SizeError(f"image size {image_size} is no multiple of patch size {patch_size}")
        if emb_dim % num_head:
            raise SizeError(f"width {emb_dim} is no multiple of the number of heads, {num_head}")
        self.shuffle = PatchShuffle(mask_ratio)
        if count_visible(num_patches, mask_ratio) < 1:
            raise SizeError(f"mask ratio {mask_ratio} leaves no patch of {num_patches} visible")

        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, emb_dim))
        self.pos_embedding = torch.nn.Parameter(torch.zeros(num_patches, 1, emb_dim))
        self.patchify = torch.nn.Conv2d(3, emb_dim, patch_size, patch_size)
        self.transformer = transformer_blocks(emb_dim, num_layer, num_head)
        self.layer_norm = torch.nn.LayerNorm(emb_dim)
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embedding, std=0.02)

    def forward(self, img, noise=None):
        """img [B,3,H,W], noise [B,T] or None -> features [1+T_vis,B,C], backward_indexes [T,B]."""
        patches = self.patchify(img)  # [B,C,h,w]
        patches = rearrange(patches, "b c h w -> (h w) b c")  # [T,B,C]
        patches = patches + self.pos_embedding
        visible, _, backward_indexes = self.shuffle(patches, noise)  # [T_vis,B,C]
        tokens = torch.cat([self.cls_token.expand(-1, visible.shape[1], -1), visible])
        # Copied once, here, or the first norm of every block would copy.
        tokens = rearrange(tokens, "t b c -> b t c").contiguous()  # [B,1+T_vis,C]
        features = self.layer_norm(self.transformer(tokens))
        features = rearrange(features, "b t c -> t b c")  # [1+T_vis,B,C]
        return features, backward_indexes


class MAE_Decoder(torch.nn.Module):
    """A shallow Transformer that fills mask tokens in for the hidden patches and predicts pixels.

    emb_dim is its own width; features of another width, encoder_dim, pass a linear layer first.
    Raises SizeError if the heads do not divide the width.
    """

    def __init__(
        self, image_size=32, patch_size=2, emb_dim=192, num_layer=4, num_head=3, encoder_dim=None
    ):
        super().__init__()
        grid = image_size // patch_size
        if emb_dim % num_head:
            raise SizeError(f"decoder width {emb_dim} is no multiple of its heads, {num_head}")

        same = encoder_dim in (None, emb_dim)  # then no weights, as in the original
        self.embed = torch.nn.Identity() if same else torch.nn.Linear(encoder_dim, emb_dim)
        self.mask_token = torch.nn.Parameter(torch.zeros(1, 1, emb_dim))
        self.pos_embedding = torch.nn.Parameter(torch.zeros(grid**2 + 1, 1, emb_dim))
        self.transformer = transformer_blocks(emb_dim, num_layer, num_head)
        self.head = torch.nn.Linear(emb_dim, 3 * patch_size**2)
        self.patch2img = Rearrange(
            "(h w) b (c p1 p2) -> b c (h p1) (w p2)", p1=patch_size, p2=patch_size, h=grid
        )
        trunc_normal_(self.mask_token, std=0.02)
        trunc_normal_(self.pos_embedding, std=0.02)

    def forward(self, features, backward_indexes):
        """features [1+T_vis,B,C], backward_indexes [T,B] -> predicted_img, mask: [B,3,H,W] each."""
        features = self.embed(features)  # [1+T_vis,B,D], where D is the decoder's width
        cls_feature, visible = features[:1], features[1:]
        (T, B), T_vis = backward_indexes.shape, visible.shape[0]

        mask_tokens = self.mask_token.expand(T - T_vis, B, -1).to(features.dtype)
        patches = take_indexes(torch.cat([visible, mask_tokens]), backward_indexes)  # [T,B,D]
        tokens = torch.cat([cls_feature, patches]) + self.pos_embedding  # [1+T,B,D]
        tokens = rearrange(tokens, "t b c -> b t c").contiguous()
        tokens = self.transformer(tokens)
        tokens = rearrange(tokens, "b t c -> t b c")
        patches = self.head(tokens[1:])  # [T,B,3*p*p]

        # The shuffle put the visible patches first: what comes back from T_vis on was hidden.
        hidden = (backward_indexes >= T_vis).unsqueeze(-1).to(patches.dtype)  # [T,B,1]
        return self.patch2img(patches), self.patch2img(hidden.expand_as(patches))


class MAE_ViT(torch.nn.Module):
    """The masked autoencoder. Raises SizeError like its encoder and decoder.

    decoder_dim: the decoder's width; None is that of the encoder, emb_dim.
    """

    def __init__(
        self, image_size=32, patch_size=2, emb_dim=192, encoder_layer=12, encoder_head=3,
        decoder_layer=4, decoder_head=3, mask_ratio=0.75, decoder_dim=None,
    ):  # fmt: skip
        super().__init__()
        sizes = dict(image_size=image_size, patch_size=patch_size)
        encoder = sizes | dict(num_layer=encoder_layer, num_head=encoder_head, emb_dim=emb_dim)
        decoder = sizes | dict(num_layer=decoder_layer, num_head=decoder_head, encoder_dim=emb_dim)
        self.encoder = MAE_Encoder(**encoder, mask_ratio=mask_ratio)
        self.decoder = MAE_Decoder(**decoder, emb_dim=decoder_dim or emb_dim)

    def forward(self, img, noise=None):
        """img [B,3,H,W], noise [B,T] or None -> predicted_img, mask: [B,3,H,W] each."""
        features, backward_indexes = self.encoder(img, noise)
        predicted_img, mask = self.decoder(features, backward_indexes)
        return predicted_img, mask


class ViT_Classifier(torch.nn.Module):
    """The encoder, shown all patches in their order, and a linear head on its cls token."""

    def __init__(self, encoder, num_classes=10):
        super().__init__()
        self.cls_token = encoder.cls_token
        self.pos_embedding = encoder.pos_embedding
        self.patchify = encoder.patchify
        self.transformer = encoder.transformer
        self.layer_norm = encoder.layer_norm
        self.head = torch.nn.Linear(self.pos_embedding.shape[-1], num_classes)

    def features(self, img, drop_path_scale=None):
        """img [B,3,H,W], drop_path_scale as in forward -> what the head sees, [B,C]."""
        patches = self.patchify(img)  # [B,C,h,w]
        patches = rearrange(patches, "b c h w -> (h w) b c")  # [T,B,C]
        patches = patches + self.pos_embedding
        tokens = torch.cat([self.cls_token.expand(-1, patches.shape[1], -1), patches])
        tokens = rearrange(tokens, "t b c -> b t c").contiguous()  # [B,1+T,C]
        if drop_path_scale is None:
            tokens = self.transformer(tokens)
        else:  # what timm's Block does, but with our numbers
            for i, block in enumerate(self.transformer):
                scale = drop_path_scale[:, i, :, None, None]  # [B,2,1,1]
                tokens = tokens + scale[:, 0] * block.attn(block.norm1(tokens))
                tokens = tokens + scale[:, 1] * block.mlp(block.norm2(tokens))
        return self.layer_norm(tokens)[:, 0]

    def forward(self, img, drop_path_scale=None):
        """img [B,3,H,W] -> logits [B,num_classes].

        drop_path_scale [B,num_layer,2] multiplies the two branches of each block, image by image:
        0 or 1 / (1 - rate) is stochastic depth (drop path, arXiv:1603.09382); None leaves them.
        """
        return self.head(self.features(img, drop_path_scale))
