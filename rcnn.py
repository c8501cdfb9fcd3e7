"""Faster R-CNN and Mask R-CNN (arXiv 1506.01497, 1703.06870): torchvision's parts, with detectron2's details.

Anchors are not rounded and lie on fixed strides. RoIs are pooled with half a pixel's correction, in as many
points as they need. Boxes have plain L1 losses. docs/evaluation.md lists what still differs.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, box_area, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from model import feature_maps, stages_of

RATIOS = (0.5, 1.0, 2.0)         # height / width of anchors
FINEST = 4                       # least stride of a pyramid's maps
C4_SIZES = (0.25, 0.5, 1.0, 2.0, 4.0)                # of anchors on one map, which has no pyramid


class Anchors(nn.Module):
    """Boxes around each position of the maps: position (i, j) of stride s has its centre at (s·j, s·i).

    sizes: for each map a list of sides of the square anchors; the others have the same area. torchvision's
    AnchorGenerator rounds them, and guesses strides from the sizes of the maps, wrongly for odd ones.
    """

    def __init__(self, strides, sizes):
        super().__init__()
        self.strides = strides
        for i, sides in enumerate(sizes):
            side, ratio = torch.cartesian_prod(torch.tensor(sides).float(), torch.tensor(RATIOS)).unbind(1)
            half = torch.stack([side / ratio.sqrt(), side * ratio.sqrt()], 1) / 2          # width, height
            self.register_buffer(f"cell{i}", torch.cat([-half, half], 1), persistent=False)

    @property
    def cells(self):
        """For each map the boxes [A, 4] around (0, 0)."""
        return [*self.buffers()]

    def num_anchors_per_location(self):
        return [*map(len, self.cells)]

    def forward(self, images, maps):
        """Maps [B, C, h, w] -> B times the same anchors, float32 [h·w·A of all maps, 4]."""
        found = []
        for x, stride, cell in zip(maps, self.strides, self.cells, strict=True):
            rows, columns = (stride * torch.arange(n, device=x.device) for n in x.shape[2:])
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            centres = torch.stack([x, y, x, y], 2).view(-1, 1, 4)
            found.append((centres + cell).view(-1, 4))
        return [torch.cat(found)] * len(images.image_sizes)


class Pooler(nn.Module):
    """RoIs -> [K, C, side, side], each from the map of its size (FPN, arXiv 1612.03144, equation 1).

    A box of 224 × 224 belongs to the map of stride 16.
    """

    def __init__(self, strides, side):
        super().__init__()
        self.strides, self.side = strides, side

    def forward(self, maps, boxes, image_sizes):
        """maps: {name: [B, C, h, w]}, of which those of `strides` come first; boxes: B times [n, 4]."""
        maps = list(maps.values())[:len(self.strides)]
        number = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
        rois = torch.cat([number, torch.cat(boxes)], 1)
        level = (4 + torch.log2(box_area(rois[:, 1:]).sqrt() / 224 + 1e-8)).floor()
        level = (level - math.log2(self.strides[0])).clamp(0, len(maps) - 1)
        pooled = rois.new_zeros(len(rois), maps[0].shape[1], self.side, self.side)
        for i, (x, stride) in enumerate(zip(maps, self.strides, strict=True)):
            chosen = level == i
            pooled[chosen] = roi_align(x.float(), rois[chosen], self.side, 1 / stride, 0, aligned=True)
        return pooled


class RPN(RegionProposalNetwork):
    """The region proposal network, with detectron2's losses: plain L1, divided by what may be sampled."""

    def compute_loss(self, objectness, deltas, labels, wanted):
        samples = [torch.where(torch.cat(masks))[0] for masks in self.fg_bg_sampler(labels)]
        positive, sampled = samples[0], torch.cat(samples)
        count = self.fg_bg_sampler.batch_size_per_image * len(labels)
        loss = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], torch.cat(labels)[sampled],
                                                  reduction="sum")
        boxes = F.l1_loss(deltas[positive], torch.cat(wanted)[positive], reduction="sum")
        return loss / count, boxes / count


class FloatHead(RPNHead):
    """Its outputs are float32 under autocast, too: in half precision boxes would be pixels off."""

    def forward(self, maps):
        objectness, deltas = super().forward(maps)
        return [*map(torch.Tensor.float, objectness)], [*map(torch.Tensor.float, deltas)]


class Heads(RoIHeads):
    """The box head and the mask head. Class 0 of the box head is the background."""

    def forward(self, maps, proposals, sizes, targets=None):
        """(detections, losses); see Detector. One of the two is empty."""
        if self.training:
            proposals, matched, labels, wanted = self.select_training_samples(proposals, targets)
        scores, deltas = self.box_predictor(self.box_head(self.box_roi_pool(maps, proposals, sizes)))
        scores, deltas = scores.float(), deltas.float()
        if self.training:
            losses = box_losses(scores, deltas, torch.cat(labels), torch.cat(wanted))
            if self.has_mask():
                losses["mask"] = self.mask_loss(maps, proposals, sizes, targets, matched, labels)
            return [], losses
        found = []
        for boxes, score, label in zip(*self.postprocess_detections(scores, deltas, proposals, sizes),
                                       strict=True):
            found.append(dict(boxes=boxes, scores=score, labels=label - 1))
        if self.has_mask():
            logits = self.masks_of(maps, [picture["boxes"] for picture in found], sizes)
            labels = torch.cat([picture["labels"] for picture in found])
            masks = logits[torch.arange(len(labels)), labels].sigmoid()
            counts = [len(picture["labels"]) for picture in found]
            for picture, part in zip(found, masks.split(counts), strict=True):
                picture["masks"] = part
        return found, {}

    def masks_of(self, maps, boxes, sizes):
        """Logits [K, C, 2 · side, 2 · side] of the C classes' masks in the boxes."""
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(maps, boxes, sizes))).float()

    def mask_loss(self, maps, proposals, sizes, targets, matched, labels):
        """Binary cross-entropy of the true class's mask, the mean over the pixels of all positive RoIs."""
        positive = [label > 0 for label in labels]
        boxes = [box[chosen] for box, chosen in zip(proposals, positive, strict=True)]
        logits = self.masks_of(maps, boxes, sizes)
        if not len(logits):          # no RoI is positive; the graph stays, as other processes wait for it
            return logits.sum() * 0
        wanted = []
        for target, box, match, chosen in zip(targets, boxes, matched, positive, strict=True):
            rois = torch.cat([match[chosen, None].to(box), box], 1)
            masks = target["masks"][:, None].to(box)
            wanted.append(roi_align(masks, rois, logits.shape[-1], 1.0, 0, aligned=True)[:, 0] >= 0.5)
        classes = torch.cat([label[chosen] for label, chosen in zip(labels, positive, strict=True)]) - 1
        logits = logits[torch.arange(len(classes)), classes]
        return F.binary_cross_entropy_with_logits(logits, torch.cat(wanted).to(logits))


def box_losses(scores, deltas, labels, wanted):
    """{classes: cross-entropy, boxes: L1 of the positive ones} of K RoIs, both divided by K.

    scores: [K, C + 1]; deltas: [K, 4 · (C + 1)]; labels: [K], 0 is the background; wanted: [K, 4].
    """
    positive = torch.where(labels > 0)[0]
    deltas = deltas.view(len(labels), -1, 4)[positive, labels[positive]]
    boxes = F.l1_loss(deltas, wanted[positive], reduction="sum") / max(1, len(labels))
    return dict(classes=F.cross_entropy(scores, labels), boxes=boxes)


class Detector(nn.Module):
    """Faster R-CNN on a ResNet.

    neck: fpn, a pyramid of maps from stride 4, or c4: one map, that of the last stage but one; the last stage
    is the box head, with one more batch norm behind. masks: a mask head as well, which c4 has not.
    anchor_scale: an anchor's side, in strides. width: channels of the pyramid and of the heads' `convs`
    convolutions; fc_width: of the box head's last layer. anchors, rois: how many the losses take of a
    picture. pre_nms, post_nms: proposals of a map before and of all after suppression, (training, testing).
    side: of what the box head gets of a RoI, in positions; c4's published one is 14.
    Raises ValueError for another network than a ResNet.
    """

    def __init__(self, backbone, num_classes, neck="fpn", masks=False, anchor_scale=8, width=256, convs=4,
                 fc_width=1024, anchors=256, rois=512, pre_nms=(2000, 1000), post_nms=(1000, 1000), side=7):
        super().__init__()
        stages = stages_of(backbone)
        self.backbone, self.pyramid, self.last = feature_maps(backbone, stages), None, stages[-1]
        strides, channels = strides_of(self.backbone), self.backbone.channels
        if neck == "fpn":
            self.stages = [name for name in stages if strides[name] >= FINEST]
            self.pyramid = FeaturePyramidNetwork([channels[name] for name in self.stages], width,
                                                 LastLevelMaxPool(), nn.BatchNorm2d)
            strides = [strides[name] for name in self.stages]
            self.multiple = strides[-1]              # sides of a batch are multiples of it, else maps misfit
            rpn_strides = [*strides, 2 * strides[-1]]
            sizes = [[anchor_scale * stride] for stride in rpn_strides]
            head, inputs = box_head(width, side, convs, fc_width), fc_width
        else:
            self.stages, inputs = stages[-2:-1], channels[self.last]
            width = channels[self.stages[0]]
            strides = rpn_strides = [strides[self.stages[0]]]
            self.multiple, sizes = 1, [[anchor_scale * strides[0] * size for size in C4_SIZES]]
            self.norm = nn.BatchNorm2d(inputs)
            head = self.run_last_stage
        mask_parts = [None] * 3
        if masks:
            mask_parts = [Pooler(strides, 14), MaskRCNNHeads(width, [width] * convs, 1, nn.BatchNorm2d),
                          MaskRCNNPredictor(width, width, num_classes)]
            zero_biases(mask_parts[2], std=0.001)
        generator = Anchors(rpn_strides, sizes)
        tops = [dict(training=numbers[0], testing=numbers[1]) for numbers in (pre_nms, post_nms)]
        self.rpn = RPN(generator, FloatHead(width, generator.num_anchors_per_location()[0]), 0.7, 0.3,
                       anchors, 0.5, *tops, nms_thresh=0.7)
        predictor = FastRCNNPredictor(inputs, num_classes + 1)
        zero_biases(predictor)
        nn.init.normal_(predictor.cls_score.weight, std=0.01)
        nn.init.normal_(predictor.bbox_pred.weight, std=0.001)
        self.heads = Heads(Pooler(strides, side), head, predictor, 0.5, 0.5, rois, 0.25, None, 0.05, 0.5, 100,
                           *mask_parts)

    def forward(self, x, sizes, targets=None):
        """Training: {name: loss}. Evaluation: for each picture a dict of boxes, labels, scores, and masks.

        x: [B, 3, H, W], pictures with zeros on the right and below; sizes: B times (h, w), without these.
        targets: B dicts of boxes [n, 4], labels [n] from 0, and masks [n, H', W'] with H' >= h, W' >= w.
        Found: boxes [m, 4], labels [m] from 0, scores [m], masks [m, 28, 28], probabilities in the box.
        """
        maps = self.maps(x)
        if targets is not None:          # torchvision's class 0 is the background
            targets = [dict(target, labels=target["labels"] + 1) for target in targets]
        proposals, losses = self.rpn(ImageList(x, sizes), maps, targets)
        found, more = self.heads(maps, proposals, sizes, targets)
        if not self.training:
            return found
        return dict(objects=losses["loss_objectness"], proposals=losses["loss_rpn_box_reg"]) | more

    def maps(self, x):
        """{name: map [B, C, h, w]}, the finest first."""
        if self.pyramid is not None:
            maps = self.backbone(x)
            return self.pyramid({name: maps[name] for name in self.stages})
        for name, child in self.backbone.items():
            if name != self.last:
                x = child(x)
        return {self.stages[0]: x}

    def run_last_stage(self, pooled):
        """C4's box head: RoIs [K, C, 14, 14] -> [K, channels of the last stage]."""
        return self.norm(self.backbone[self.last](pooled)).mean((2, 3))


def strides_of(maps):
    """{stage: its stride in pixels} of a FeatureMaps, by a look at a small picture."""
    maps.eval()
    with torch.no_grad():
        found = maps(torch.zeros(1, 3, 64, 64))
    maps.train()
    return {name: 64 // x.shape[-1] for name, x in found.items()}


def box_head(width, side, convs, fc_width):
    """RoIs [K, width, side, side] -> [K, fc_width]: convolutions with batch norms, and one linear layer."""
    head = FastRCNNConvFCHead((width, side, side), [width] * convs, [fc_width], nn.BatchNorm2d)
    for module in head:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=1)
    zero_biases(head)
    return head


def zero_biases(module, std=None):
    """Sets the biases of linear layers and convolutions to 0; std: of the weights of the last one."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            last = layer
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    if std:
        nn.init.normal_(last.weight, std=std)
