package main

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"io"
	"slices"
	"time"
)

// pathCase is one question to Go's verifier: does this chain lead to these roots at this time?
type pathCase struct {
	Name  string   `json:"name"`
	Chain [][]byte `json:"chain"`
	Roots [][]byte `json:"roots"`
	At    int64    `json:"at"`
}

// paths answers each case by an event: the fingerprints of all authorities on valid paths, or the refusal.
func paths(input io.Reader) error {
	var cases []pathCase
	if err := json.NewDecoder(input).Decode(&cases); err != nil {
		return err
	}
	for _, one := range cases {
		authorities, err := authoritiesOf(one)
		if err != nil {
			report(event{"event": "path", "name": one.Name, "refused": err.Error()})
			continue
		}
		report(event{"event": "path", "name": one.Name, "authorities": authorities})
	}
	return nil
}

func authoritiesOf(one pathCase) ([]string, error) {
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, der := range one.Roots {
		root, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		roots.AddCert(root)
	}
	var leaf *x509.Certificate
	for _, der := range one.Chain {
		certificate, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		if leaf == nil {
			leaf = certificate
		} else {
			intermediates.AddCert(certificate)
		}
	}
	chains, err := leaf.Verify(x509.VerifyOptions{
		Roots:         roots,
		Intermediates: intermediates,
		CurrentTime:   time.Unix(one.At, 0),
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return nil, err
	}
	found := []string{}
	for _, chain := range chains {
		for _, authority := range chain[1:] {
			sum := sha256.Sum256(authority.Raw)
			found = append(found, hex.EncodeToString(sum[:]))
		}
	}
	slices.Sort(found)
	return slices.Compact(found), nil
}
