<?php
// Puts the cases on stdin to `verify` of docs/receiving.md, as tests/helpers/snippets.py says.
declare(strict_types=1);
require __DIR__ . '/verify.php';
$answers = [];
foreach (json_decode(stream_get_contents(STDIN), true) as $name => [$secrets, $headers, $body, $now]) {
    try {
        $answers[$name] = [verify($secrets, $headers, base64_decode($body), $now), null];
    } catch (Exception $error) {
        $answers[$name] = [null, $error->getMessage()];
    }
}
echo json_encode($answers);
