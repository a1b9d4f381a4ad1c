// Puts the cases on stdin to `verify` of docs/receiving.md, as tests/helpers/snippets.py says.
import { readFileSync } from 'node:fs';
import { verify } from './verify.mjs';
const answers = {};
for (const [name, [secrets, headers, body, now]] of Object.entries(JSON.parse(readFileSync(0)))) {
  try {
    answers[name] = [verify(secrets, headers, Buffer.from(body, 'base64'), now), null];
  } catch (error) {
    answers[name] = [null, error.message];
  }
}
console.log(JSON.stringify(answers));
