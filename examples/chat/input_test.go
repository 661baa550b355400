package main

import (
	"strings"
	"testing"
)

// Lines must come out the same however the bytes come in, and whichever process
// got which of them: the half-typed line goes through every cut.
func TestTypist(t *testing.T) {
	long := strings.Repeat("x", maxLine)
	tests := []struct {
		in   string
		want []string
		half string
	}{
		{"hello\n", []string{"hello"}, ""},
		{"hello\r\nyou\r\n", []string{"hello", "you"}, ""},
		{"hel", nil, "hel"},
		{"a\n\nb", []string{"a", ""}, "b"},
		{"zoë\n", []string{"zoë"}, ""},
		{"a\x1b[2Jb\x07\tc\n", []string{"a[2Jb c"}, ""},
		{"bad \xff utf8\n", []string{"bad  utf8"}, ""},
		{long + "\n", []string{long}, ""},
		{long + "\r\n", []string{long}, ""},
		{long + "y\n", []string{"TOO LONG"}, ""},
		{long + "y\r\nok\n", []string{"TOO LONG", "ok"}, ""},
		{long + long + long + "\nok\nh", []string{"TOO LONG", "ok"}, "h"},
	}
	for _, tt := range tests {
		for _, size := range []int{1, 2, 5, 1 << 20} {
			var got []string
			var ty typist
			for in := []byte(tt.in); len(in) > 0; {
				p := in[:min(size, len(in))]
				in = in[len(p):]
				for len(p) > 0 {
					line, rest, done, tooLong := ty.next(p)
					p = rest
					if tooLong {
						line = "TOO LONG"
					}
					if done {
						got = append(got, line)
					}
				}
				// As if the session moved here.
				ty = typist{half: append([]byte(nil), ty.half...)}
				if len(ty.half) > maxLine+2 {
					t.Fatalf("%d bytes of a line are held", len(ty.half))
				}
			}
			if strings.Join(got, "|") != strings.Join(tt.want, "|") || string(ty.half) != tt.half {
				t.Errorf("%.30q, %d at a time: lines %.60q and half %q, want %.60q and %q", tt.in, size, got, ty.half, tt.want, tt.half)
			}
		}
	}
	// A state from elsewhere may hold more than we would.
	ty := typist{half: make([]byte, 3*maxLine)}
	if _, _, done, tooLong := ty.next([]byte("x\n")); !done || !tooLong {
		t.Errorf("a restored line that is too long: done %t, too long %t", done, tooLong)
	}
}

func TestParse(t *testing.T) {
	tests := []struct{ in, name, arg string }{
		{"hello there ", "", "hello there"},
		{"", "", ""},
		{"/join ops", "join", "ops"},
		{"/JOIN   ops ", "join", "ops"},
		{"/msg bob hi  there", "msg", "bob hi  there"},
		{"/", "/", ""},
		{"/ x", "/", "x"},
		{"//x", "/x", ""},
		{" /who", "who", ""},
	}
	for _, tt := range tests {
		if c := parse(tt.in); c.name != tt.name || c.arg != tt.arg {
			t.Errorf("%q is command %q with %q, want %q with %q", tt.in, c.name, c.arg, tt.name, tt.arg)
		}
	}
	for s, want := range map[string]bool{
		"bob": true, "zoë": true, "a-b_9": true, "": false, "a b": false, "<b>": false, "a\x1b": false,
		strings.Repeat("x", 24): true, strings.Repeat("x", 25): false,
	} {
		if validName(s) != want {
			t.Errorf("validName(%q) is %t", s, !want)
		}
	}
}
