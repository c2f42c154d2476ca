"""Shards whose samples hold teachers' embeddings of themselves: DataCompDR, DFNDR, and what Apple's generator makes of other data.

Of a sample UID, beside UID.jpg and UID.txt:

    UID.paug.json   {"param_aug": [AUGMENTATION, ...]}, V of them; DataCompDR has that list as a string of JSON.
                    AUGMENTATION = [[top, left, height, width], [[number, magnitude], ...]]: a crop in pixels of the stored image, then
                    operations of torchvision's RandAugment, by their places in its list, on the crop at the teacher's size; null for none.
    UID.syn.json    {"syn_text": [CAPTION, ...]}, S captions of a captioner; DFNDR has several such lists, whose names begin with syn_text.
    UID.npz         arrays image_emb (V, W) and text_emb; or UID.pth.gz, the gzip of torch.save of a dict of them, which the bf16 sets have.
                    A row is the unit embeddings of each teacher, one after the other: 2 x 768 = W in DataCompDR.
                    text_emb is (1 + S, W), of UID.txt and then of the synthetic captions; newer sets have the one row of UID.txt in it, and
                    the others in NAME_emb (S, W) for the list NAME of UID.syn.json.

Sources: the sets' pages at huggingface.co/datasets/apple (DataCompDR-12M, -bf16, -1B) with the viewer's first rows; github.com/apple/
ml-mobileclip at 4144bb1, training/dr/transforms.py (what an augmentation is, the operations' places) and training/open_clip_v2.patch
(`preprocess_dr`: which rows are read); github.com/apple/ml-mobileclip-dr at 418551d, scripts/gen.py (how embeddings are made) and
src/raygen/datasetio.py (members and types). V is 30 in DataCompDR-12M and 10 in DataCompDR-1B.

`members` reads the members, `replay` applies an augmentation, `shards` says what a set holds and for whom, `pairs` makes batches.
"""
