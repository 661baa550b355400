package main

import (
	"bytes"
	"net"
	"strings"
	"testing"
)

// Scripts branch on the exit code and read standard output, so a failure must
// have its code and leave standard output empty.
func TestExitCodes(t *testing.T) {
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	free.Close()
	tests := []struct {
		args string
		code int
		says string
	}{
		{"", exitUsage, "-addr is missing"},
		{"-addr 127.0.0.1:1 -tls 1.1", exitUsage, "1.2 and 1.3"},
		{"-addr 127.0.0.1:1 -sessions many", exitUsage, "many"},
		{"-addr 127.0.0.1:1 extra", exitUsage, "extra"},
		{"-addr 127.0.0.1:1 -ca /nonexistent.pem", exitUsage, "/nonexistent.pem"},
		{"-addr 127.0.0.1:1 -ca main.go", exitUsage, "no certificate in main.go"},
		{"-help", exitOK, "-sessions"},
		{"-sessions 2 -addr " + free.Addr().String(), exitConnect, "connection refused"},
	}
	for _, tt := range tests {
		var out, errs bytes.Buffer
		code := run(strings.Fields(tt.args), strings.NewReader(""), &out, &errs)
		if code != tt.code || !strings.Contains(errs.String(), tt.says) || out.Len() > 0 {
			t.Errorf("loadclient %s: exit %d, want %d; stdout %q; stderr does not say %q: %s",
				tt.args, code, tt.code, out.String(), tt.says, errs.String())
		}
	}
}
