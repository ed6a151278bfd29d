// The mask editor of app.py: the image with its masked patches. Props: picture, rows, columns, and value, the indices of
// the masked patches in row-major order. It sends indices, not a drawing, so the server has no image to decode.
const canvas = element.querySelector("canvas"), pen = canvas.getContext("2d"), photo = new Image();
const position = element.querySelector("[role=status]");
let masked = new Set(), masking = null, last = null, cursor = 0;

function draw() {
    const {picture, rows, columns} = props, side = picture ? Math.ceil(480 / Math.max(rows, columns)) : 0;
    [canvas.width, canvas.height] = [columns * side, rows * side];
    if (!picture) return;
    const patch = n => [n % columns * side, Math.floor(n / columns) * side, side, side];
    pen.drawImage(photo, 0, 0, canvas.width, canvas.height);
    pen.fillStyle = "rgb(79 70 229 / 80%)";
    masked.forEach(n => pen.fillRect(...patch(n)));
    pen.strokeStyle = "rgb(255 255 255 / 50%)";
    for (let n = 0; n < rows * columns; n++) pen.strokeRect(...patch(n));
    if (canvas.matches(":focus-visible")) {
        [pen.strokeStyle, pen.lineWidth] = ["#f97316", 6];
        pen.strokeRect(...patch(cursor));
    }
}

function stroke(event) { // starts at the last position, because a fast pointer skips patches
    const {rows, columns} = props, box = canvas.getBoundingClientRect();
    const here = [(event.clientX - box.x) / box.width * columns, (event.clientY - box.y) / box.height * rows];
    const from = last ?? here, steps = Math.ceil(8 * Math.hypot(here[0] - from[0], here[1] - from[1])) || 1;
    for (let step = 0; step <= steps; step++) {
        const [x, y] = from.map((start, axis) => Math.floor(start + (here[axis] - start) * step / steps));
        if (x < 0 || y < 0 || x >= columns || y >= rows) continue;
        cursor = y * columns + x;
        masking ??= !masked.has(cursor);
        masking ? masked.add(cursor) : masked.delete(cursor);
    }
    last = here;
    draw();
}

function finish() {
    if (!props.picture) return;
    masking = last = null;
    props.value = [...masked].join(" ");
    trigger("input");
}

function press(event) {
    const {rows, columns} = props, row = Math.floor(cursor / columns), column = cursor % columns;
    const moves = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}, move = moves[event.key];
    if (!props.picture || !(move || event.key === " ")) return;
    event.preventDefault(); // the page does not scroll
    if (move) {
        const clamp = (value, count) => Math.min(Math.max(value, 0), count - 1);
        cursor = clamp(row + move[0], rows) * columns + clamp(column + move[1], columns);
    } else {
        masked.delete(cursor) || masked.add(cursor);
        finish();
    }
    const state = masked.has(cursor) ? "masked" : "visible";
    position.textContent = `row ${Math.floor(cursor / columns) + 1}, column ${cursor % columns + 1}: ${state}`;
    draw();
}

canvas.onpointerdown = event => { canvas.setPointerCapture(event.pointerId); stroke(event); };
canvas.onpointermove = event => last && stroke(event);
canvas.onpointerup = canvas.onpointercancel = finish;
canvas.onkeydown = press;
canvas.onfocus = canvas.onblur = draw;
element.querySelector("button").onclick = () => { masked.clear(); draw(); finish(); };
photo.onload = draw;
watch(["value", "picture"], () => {
    masked = new Set(props.value.split(" ").filter(Boolean).map(Number));
    cursor = Math.min(cursor, props.rows * props.columns - 1);
    photo.src = props.picture;
    draw();
});
