"""How low does CMAE's contrast get when its encoder learns nothing? cmae.py with a frozen random encoder.

    python results/frozen_encoder.py --tiny --data data/cifar10 --images 10000          flags of cmae.py may follow

Only the projection, the decoder and the location head are trained. The momentum encoder is the same frozen one. A
stopped run goes on with `python results/frozen_encoder.py --resume FOLDER`, not with the line for cmae.py that the
program prints.
"""
import pathlib, sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import cmae


class CMAE(cmae.CMAE):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.encoder.requires_grad_(False)


if __name__ == "__main__":
    cmae.CMAE = CMAE
    sys.exit(cmae.main(sys.argv[1:]))
