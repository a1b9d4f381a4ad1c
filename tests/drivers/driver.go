// Puts the cases on stdin to `verify` of docs/receiving.md, as tests/helpers/snippets.py says.
package main

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"os"
	"time"
)

// A second main of the one program: building is what takes long.
func init() {
	if len(os.Args) < 2 {
		return
	}
	var cases map[string][4]json.RawMessage
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	answers := map[string][2]*string{}
	for name, given := range cases {
		var secrets []string
		var fields map[string]string
		var body string
		var now int64
		json.Unmarshal(given[0], &secrets)
		json.Unmarshal(given[1], &fields)
		json.Unmarshal(given[2], &body)
		json.Unmarshal(given[3], &now)
		headers := http.Header{}
		for key, value := range fields {
			headers.Set(key, value)
		}
		raw, _ := base64.StdEncoding.DecodeString(body)
		id, err := verify(secrets, headers, raw, time.Unix(now, 0))
		if err != nil {
			problem := err.Error()
			answers[name] = [2]*string{nil, &problem}
		} else {
			answers[name] = [2]*string{&id, nil}
		}
	}
	json.NewEncoder(os.Stdout).Encode(answers)
	os.Exit(0)
}
