"""torchdistill's side of row 8, run by the peers' own Python: every question is one whole job (see
whole_job.told), answered by the seconds of its parts.

Release 1.1.4 is the last that caches a teacher's outputs: a file an image, written during the first epoch and read in
each later one. The data are JPEGs as torchvision reads them.
"""

import shutil
import time
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset, RandomSampler
from torchdistill.core.distillation import DistillationBox
from torchvision.transforms import v2

from benchmarks.children import serve, take_standard_output
from kd_dist.config import MEAN, STD
from kd_dist.models import build


class ImageStore(Dataset):
    """The listed JPEGs, centre crop, float32 normalised, with their labels."""

    def __init__(self, told: dict):
        self.root, self.paths, self.labels = Path(told["root"]), told["paths"], told["labels"]
        self.transform = v2.Compose(
            [
                v2.PILToTensor(),
                v2.Resize(told["size"], antialias=True),
                v2.CenterCrop(told["size"]),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.root / self.paths[index]) as image:
            return self.transform(image.convert("RGB")), self.labels[index]


def box(told: dict) -> DistillationBox:
    """The library's own trainer: knowledge distillation of logits, its cache switched on by `cache_output`."""
    loader = {
        "dataset_id": "train",
        "cache_output": told["cache"],
        "sampler": {"class_or_func": RandomSampler},
        "kwargs": {"batch_size": told["batch"], "num_workers": told["workers"]},
    }
    kd = {
        "key": "KDLoss",
        "kwargs": {
            "student_module_path": ".",
            "student_module_io": "output",
            "teacher_module_path": ".",
            "teacher_module_io": "output",
            "temperature": told["temperature"],
            "alpha": 1 - told["alpha"],
            "reduction": "batchmean",
        },
    }
    config = {
        "num_epochs": told["epochs"],
        "train_data_loader": loader,
        "teacher": {"forward_proc": "forward_batch_only", "sequential": [], "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "sequential": [], "requires_grad": True},
        "optimizer": {
            "key": "SGD",
            "kwargs": {"lr": told["lr"], "momentum": 0.9, "nesterov": True, "weight_decay": told["weight_decay"]},
        },
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": kd, "weight": 1.0}}},
        },
    }
    torch.manual_seed(0)
    teacher, student = (build(told[kind], told["classes"]) for kind in ("teacher", "student"))
    device = torch.device(told["device"])
    data = {"train": ImageStore(told)}
    return DistillationBox(teacher.to(device).eval(), student.to(device), data, config, device, None, False, 1)


def job(told: dict) -> dict[str, float]:
    """A whole job from an empty cache: seconds of the first epoch, which fills it, and of the rest."""
    torch.set_num_threads(told["threads"])
    shutil.rmtree(told["cache"], ignore_errors=True)
    started = time.perf_counter()
    trainer = box(told)
    seconds = {}
    for epoch in range(told["epochs"]):
        train_epoch(trainer, epoch)
        name = "first epoch, writing the cache" if epoch == 0 else "later epochs"
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
        started = time.perf_counter()
    return seconds


def train_epoch(trainer: DistillationBox, epoch: int) -> None:
    """The loop of torchdistill's own image-classification example."""
    trainer.pre_epoch_process(epoch=epoch)
    trainer.teacher_model.eval()
    trainer.student_model.train()
    for images_BCHW, labels_B, extras in trainer.train_data_loader:
        images_BCHW, labels_B = images_BCHW.to(trainer.device), labels_B.to(trainer.device)
        trainer.pre_forward_process()
        loss = trainer.forward_process(images_BCHW, labels_B, extras)
        trainer.post_forward_process(loss=loss)
    trainer.post_epoch_process()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    serve(job, take_standard_output())


if __name__ == "__main__":
    main()
